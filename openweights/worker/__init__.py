"""The worker: takes jobs from a store, runs each in its own process tree, and reports what came of
it.

main.py        the loop: register, claim, execute, go away
execution.py   one job from claim to end
guard.py       a small process between the worker and the job: nothing of a job outlives it
process.py     the worker's side of the guard
folder.py      the folder in which a job runs
log_pump.py    the job's output, into the store as it comes
heartbeat.py   the thread that keeps the lease and hears of cancels
results.py     events left in the spool, and files under uploads/
"""
