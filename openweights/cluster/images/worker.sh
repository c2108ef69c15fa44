#!/bin/sh
# What runs in a pod: the worker that WORKER_ID names, until it ends. Without WORKER_ID it is a
# development pod, in which somebody works over SSH.
#
# PUBLIC_KEY: who may log in. There are no passwords.
# LEFT_ALONE_S: how long after its worker a pod waits to be ended before it ends itself.
set -u

if [ -n "${PUBLIC_KEY:-}" ]; then
    mkdir -p "$HOME/.ssh"
    printf '%s\n' "$PUBLIC_KEY" > "$HOME/.ssh/authorized_keys"
    chmod 700 "$HOME/.ssh"
    chmod 600 "$HOME/.ssh/authorized_keys"
    ssh-keygen -A
    mkdir -p /run/sshd
    "$(command -v sshd)" -o PasswordAuthentication=no -o PermitRootLogin=prohibit-password
fi

# A handler, not '': a signal that is ignored here would be ignored by the worker, too.
ended=
trap 'ended=1' TERM INT

pause() {
    sleep "$1" &
    sleeper=$!
    # A signal that came before the sleeper was there has not ended it; a later one ends both.
    [ -n "$ended" ] || wait "$sleeper"
    # As it has just been made it may still have the handler, which would take any other signal.
    kill -KILL "$sleeper" 2> /dev/null
}

if [ -n "${WORKER_ID:-}" ]; then
    ow worker
    [ -n "$ended" ] || pause "${LEFT_ALONE_S:-900}"
fi

# A container that ends is started again by RunPod, and its worker would come back from the dead.
# The manager terminates the pod once the worker's row has ended. Where no manager is left to do it,
# nobody would, and it would be paid for for ever: RunPod puts runpodctl into each pod, with a key
# for that pod alone.
while [ -z "$ended" ]; do
    if [ -n "${WORKER_ID:-}" ] && [ -n "${RUNPOD_POD_ID:-}" ]; then
        runpodctl remove pod "$RUNPOD_POD_ID"
    fi
    pause 3600
done
