-- Workers: registration, claims, heartbeats; and the rows that the cluster writes for its pods.

create or replace function openweights.worker_json(w public.workers) returns jsonb
language sql stable as $$
    select to_jsonb(w) - '{seq}'::text[]
$$;

create or replace function openweights.lock_worker(p_organization uuid, p_worker_id text)
returns public.workers language plpgsql as $$
declare
    w public.workers;
begin
    select * into w from public.workers
    where organization_id = p_organization and id = p_worker_id for no key update;
    if not found then
        perform openweights.refuse('not_found', format('no worker %L in this organization', p_worker_id));
    end if;
    return w;
end $$;

-- A row of `workers` as a worker, or the cluster, describes it.
create or replace function openweights.read_worker(me public.api_keys, p_worker jsonb)
returns public.workers language plpgsql as $$
declare
    w public.workers;
begin
    if jsonb_typeof(p_worker) is distinct from 'object' then
        perform openweights.refuse('invalid_input', 'p_worker must be an object with the fields of a worker');
    end if;
    w := jsonb_populate_record(null::public.workers, p_worker);
    w.organization_id := me.organization_id;
    if coalesce(w.id, '') !~ '^[A-Za-z0-9][A-Za-z0-9._:-]{0,199}$' then
        perform openweights.refuse('invalid_input', format(
            '%L cannot be a worker''s id: use letters, digits and . _ : -', w.id));
    end if;
    w.docker_image := coalesce(w.docker_image, '');
    w.hardware_type := coalesce(w.hardware_type, 'cpu');
    w.gpu_count := coalesce(w.gpu_count, 0);
    w.vram_gb := coalesce(w.vram_gb, 0);
    perform openweights.check_worker_row(w);
    return w;
end $$;

-- A worker's key that no worker has goes to the first that registers with it; not to one that is
-- there already, which it would push aside. Once a worker that nobody manages has ended, or has been
-- silent for a lease, the next may have its key: whoever starts `ow worker` again has no other.
create or replace function openweights.bind_key(me public.api_keys, p_worker_id text)
returns public.api_keys language plpgsql as $$
declare
    last public.workers;
begin
    if me.role <> 'worker' or me.worker_id = p_worker_id then
        return me;
    end if;
    if me.worker_id is not null then
        select w.* into last
        from public.workers w
        where w.organization_id = me.organization_id and w.id = me.worker_id and w.provider is null;
        if not found then
            return me;
        end if;
        if last.status <> 'terminated' and last.pinged_at > now() - make_interval(secs => (
            select lease_s from public.organizations where id = me.organization_id))
        then
            perform openweights.refuse('forbidden', format(
                'worker %s is at work with this key: each needs its own, which an admin makes with '
                '`ow token create --role worker`; if it is gone, try again in a minute', last.id));
        end if;
    end if;
    update public.api_keys set worker_id = p_worker_id
    where id = me.id and worker_id is not distinct from me.worker_id
        and not exists (
            select from public.workers
            where organization_id = me.organization_id and id = p_worker_id
        )
        and not exists (
            select from public.api_keys
            where organization_id = me.organization_id and worker_id = p_worker_id
        )
    returning * into me;
    if not found then
        perform openweights.refuse('forbidden', format(
            'worker %s exists, and this key is not its own: take another id', p_worker_id));
    end if;
    return me;
end $$;

create or replace function public.register_worker(p_worker jsonb) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'worker');
    w workers := read_worker(me, p_worker);
    is_allowed boolean;
begin
    me := bind_key(me, w.id);
    is_allowed := check_worker(me, w.id);
    -- A pod's row was written before the pod: what it costs, on which tier it runs and whether it
    -- is to end is not the worker's to say.
    insert into workers as old (organization_id, id, docker_image, hardware_type, gpu_count,
        vram_gb, cloud_type, pod_id, status)
    values (w.organization_id, w.id, w.docker_image, w.hardware_type, w.gpu_count, w.vram_gb,
        w.cloud_type, w.pod_id, 'active')
    on conflict (organization_id, id) do update set
        seq = default, docker_image = excluded.docker_image,
        -- As it was asked for, by which jobs name it, unless the pod has come with other GPUs.
        hardware_type = case when old.provider is null or old.gpu_count <> excluded.gpu_count
            then excluded.hardware_type else old.hardware_type end,
        gpu_count = excluded.gpu_count,
        vram_gb = excluded.vram_gb,
        -- The cluster may not have heard of the pod that it asked for; it costs all the same.
        started_at = case when old.provider is null then old.started_at
            else coalesce(old.started_at, old.created_at) end,
        cloud_type = case when old.provider is null then excluded.cloud_type else old.cloud_type end,
        pod_id = case when old.provider is null then excluded.pod_id
            else coalesce(old.pod_id, excluded.pod_id) end,
        status = case when old.provider is not null and old.status = 'shutdown' then 'shutdown'
            else 'active' end,
        created_at = now(), pinged_at = now()
    where old.provider is null or old.status <> 'terminated'
    returning * into w;
    if not found then
        perform refuse('invalid_state', format(
            'the pod of worker %s has ended: take another id', p_worker ->> 'id'));
    end if;
    perform lose_held_run(w.organization_id, w.id);
    return worker_json(w);
end $$;

-- A worker that has ended stays so: only registering makes a new one of that id.
create or replace function openweights.change_worker_status(w public.workers, p_status text)
returns public.workers language plpgsql as $$
begin
    update public.workers set status = p_status
    where organization_id = w.organization_id and id = w.id and status <> 'terminated';
    if p_status = 'terminated' then
        perform openweights.lose_held_run(w.organization_id, w.id);
    end if;
    return openweights.lock_worker(w.organization_id, w.id);
end $$;

create or replace function public.set_worker_status(p_worker_id text, p_status text) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'worker');
    is_allowed boolean := check_worker(me, p_worker_id);
    w workers;
begin
    if p_status is null or p_status not in ('starting', 'active', 'shutdown', 'terminated') then
        perform refuse('invalid_input', format('%L is no status of a worker', p_status));
    end if;
    w := lock_worker(me.organization_id, p_worker_id);
    return worker_json(change_worker_status(w, p_status));
end $$;

-- ---- claims

-- Whether the worker could run the job. An image of '' is any; a worker of image '' or 'dev' has the
-- user's own environment.
create or replace function openweights.fits(j public.jobs, w public.workers) returns boolean
language sql stable as $$
    select (j.docker_image in ('', w.docker_image) or w.docker_image in ('', 'dev'))
        and j.requires_vram_gb <= w.vram_gb
        and (j.allowed_hardware is null or w.hardware_type = any (j.allowed_hardware))
        and (j.max_usd_per_hour is null
            or coalesce(w.price_usd_per_hour, 0) <= j.max_usd_per_hour)
        and (w.cloud_type is null
            or coalesce(j.params ->> 'cloud_type', 'SECURE') in ('ALL', w.cloud_type))
$$;

-- An inference of this priority is a question that a person waits for.
create or replace function openweights.is_question(p_type text, p_priority integer) returns boolean
language sql immutable as $$
    select p_type = 'inference' and p_priority >= 1000
$$;

-- Whether the last ten runs of a worker were questions: it is the turn of another job then.
create or replace function openweights.has_answered_enough(w public.workers) returns boolean
language plpgsql stable as $$
begin
    return 10 = (
        select count(*) from (
            select job_id from public.runs
            where organization_id = w.organization_id and worker_id = w.id
            order by id desc limit 10
        ) r join public.jobs j on j.organization_id = w.organization_id and j.id = r.job_id
        where openweights.is_question(j.type, j.priority)
    );
end $$;

-- The id of the best pending job that fits the worker, whose turn has come, and that its limit and its
-- key's budget let run; it is locked. Null when there is none. The settings hold the planner to the
-- index of what waits (it cannot know how few jobs that are, and would sort them), and to one plan for
-- all workers (else it plans anew each time, which takes longer than the claim). Few columns, because
-- a statement is set up anew each time, column by column.
create or replace function openweights.next_job(
    w public.workers, p_spent_keys uuid[], p_running jsonb, p_is_question boolean default null
) returns text
language plpgsql
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set enable_sort = off as $$
declare
    best text;
    best_label text;
    most integer;
    question boolean;
begin
    select j.id, j.label, j.max_running, openweights.is_question(j.type, j.priority)
    into best, best_label, most, question
    from public.jobs j
    where j.organization_id = w.organization_id and j.status = 'pending' and openweights.fits(j, w)
        and (j.not_before is null or j.not_before <= now())
        and (j.after is null or not exists (
            select from public.jobs needed
            where needed.organization_id = j.organization_id and needed.id = any (j.after)
                and needed.status <> 'completed'))
        and (j.max_running is null or j.max_running > coalesce((p_running ->> j.label)::integer, 0))
        and j.submitted_by_key <> all (p_spent_keys)
        and (j.max_cost_usd is null
            or openweights.job_cost(j.organization_id, j.id) < j.max_cost_usd)
        and (p_is_question is null or openweights.is_question(j.type, j.priority) = p_is_question)
    order by j.priority desc, j.created_at, j.seq
    limit 1 for no key update skip locked;
    if question and p_is_question is null and openweights.has_answered_enough(w) then
        return coalesce(
            openweights.next_job(w, p_spent_keys, p_running, false),
            openweights.next_job(w, p_spent_keys, p_running, true));
    end if;
    if most is not null then
        perform openweights.wait_for_label(w.organization_id, best_label);
        if not openweights.has_room(w.organization_id, best_label, most) then
            p_running := p_running || jsonb_build_object(best_label, most);
            return openweights.next_job(w, p_spent_keys, p_running, p_is_question);
        end if;
    end if;
    return best;
end $$;

-- Let a worker go on with the run that it holds: a lost answer, asked for again, gets the same run.
-- Null when it holds none that goes on.
create or replace function openweights.resume_run(w public.workers, p_expires_at timestamptz)
returns json language plpgsql as $$
declare
    r public.runs := openweights.held_run(w.organization_id, w.id);
    j public.jobs;
begin
    if r.id is null then
        return null;
    end if;
    j := openweights.lock_job(w.organization_id, r.job_id);
    if j.status <> 'in_progress' then
        -- It was canceled, and the worker runs nothing: it would not be asking.
        j := openweights.lose_run(j, r, 'worker');
        return null;
    end if;
    update public.runs set lease_expires_at = p_expires_at where id = r.id;
    return json_build_object('job', openweights.job_json(j), 'run', openweights.run_json(r));
end $$;

create or replace function public.claim_job(p_worker_id text) returns json
language plpgsql security definer set search_path = openweights, public, pg_temp
set enable_seqscan = off as $$
declare
    me api_keys := openweights.caller('admin', 'worker');
    is_allowed boolean := check_worker(me, p_worker_id);
    -- One claim of a worker at a time.
    w workers := lock_worker(me.organization_id, p_worker_id);
    now_there record;
    job_id text;
    answer json;
begin
    -- What there seldom is, asked for in one statement.
    select now() + make_interval(secs => o.lease_s) as lease_expires_at,
        exists (
            select from runs r where r.organization_id = w.organization_id
                and r.status = 'in_progress' and r.lease_expires_at < now()
        ) as expired_runs,
        exists (
            select from runs r where r.organization_id = w.organization_id
                and r.status = 'in_progress' and r.worker_id = w.id
        ) as held_run,
        exists (
            select from api_keys k
            where k.organization_id = w.organization_id and k.budget_usd is not null
        ) as budgets,
        o.paused_at is not null as is_paused,
        running_by_label(o.id) as running
    into now_there from organizations o where o.id = w.organization_id;
    if now_there.expired_runs then
        perform lose_expired_runs(w.organization_id, w.id);
    end if;
    if now_there.held_run then
        answer := resume_run(w, now_there.lease_expires_at);
    end if;
    if answer is not null or w.status <> 'active' or now_there.is_paused then
        return answer;
    end if;
    job_id := next_job(
        w, case when now_there.budgets then spent_keys(w.organization_id) else '{}' end,
        now_there.running);
    if job_id is null then
        return null;
    end if;
    return start_run(
        w.organization_id, job_id, w.id, w.price_usd_per_hour, now_there.lease_expires_at);
end $$;

-- ---- heartbeats

-- Renew, or win back, the lease of a worker's run; false when the run is no longer its own.
create or replace function openweights.renew_lease(
    w public.workers, j public.jobs, r public.runs, p_expires_at timestamptz
) returns boolean language plpgsql as $$
begin
    if r.worker_id is distinct from w.id or r.attempt <> j.attempts then
        return false;
    elsif r.status = 'in_progress' then
        update public.runs set lease_expires_at = p_expires_at where id = r.id;
        return true;
    elsif r.ended_by is distinct from 'lease' or j.status <> 'pending' or w.status = 'terminated'
        or exists (
            select from public.runs
            where organization_id = w.organization_id and worker_id = w.id and status = 'in_progress'
        )
    then
        return false;
    end if;
    -- Nobody has taken the job since its lease ran out.
    perform openweights.charge(r, -1);
    update public.runs
    set status = 'in_progress', ended_by = null, error = null, ended_at = null,
        lease_expires_at = p_expires_at
    where id = r.id;
    update public.jobs
    set status = 'in_progress', worker_id = w.id, lost_attempts = lost_attempts - 1,
        updated_at = now()
    where organization_id = j.organization_id and id = j.id;
    return true;
end $$;

create or replace function public.heartbeat(p_worker_id text, p_run_id bigint default null)
returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp
set enable_seqscan = off as $$
declare
    me api_keys := openweights.caller('admin', 'worker');
    is_allowed boolean := check_worker(me, p_worker_id);
    w workers := lock_worker(me.organization_id, p_worker_id);
    locked record;
    j jobs;
    r runs;
    o organizations;
begin
    update workers set pinged_at = now() where organization_id = w.organization_id and id = w.id;
    if p_run_id is not null then
        locked := lock_run(me.organization_id, p_run_id);
        j := locked.j;
        r := locked.r;
        select * into o from organizations where id = me.organization_id;
        if not renew_lease(w, j, r, now() + make_interval(secs => o.lease_s)) then
            return '"fenced"';
        elsif j.status = 'canceled' then
            return '"cancel"';
        elsif j.timeout_at <= now()
            or r.created_at + make_interval(secs => coalesce(j.max_duration_s, o.max_duration_s)) <= now()
            or (j.max_cost_usd is not null and job_cost(j.organization_id, j.id) >= j.max_cost_usd)
            or exists (
                select from api_keys k where k.id = j.submitted_by_key
                    and k.budget_usd is not null and spent(k) >= k.budget_usd
            )
        then
            return '"timeout"';
        elsif is_stalled(j, r) then
            return '"stalled"';
        end if;
    end if;
    return case when w.status in ('shutdown', 'terminated') then '"shutdown"' else '"continue"' end;
end $$;

-- ---- rows of pods, written by the cluster

-- Before the pod is asked for, so that no pod is without a row. Again, for a row that is still
-- starting and has no pod, replaces what was written.
create or replace function public.create_worker(
    p_worker jsonb, p_price_usd_per_hour numeric default null, p_provider text default 'runpod'
) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
    w workers := read_worker(me, p_worker);
begin
    insert into workers as old (organization_id, id, docker_image, hardware_type, gpu_count, vram_gb,
        cloud_type, status, provider, price_usd_per_hour)
    values (w.organization_id, w.id, w.docker_image, w.hardware_type, w.gpu_count, w.vram_gb,
        w.cloud_type, 'starting', p_provider, p_price_usd_per_hour)
    on conflict (organization_id, id) do update set
        docker_image = excluded.docker_image, hardware_type = excluded.hardware_type,
        gpu_count = excluded.gpu_count, vram_gb = excluded.vram_gb,
        cloud_type = excluded.cloud_type,
        provider = excluded.provider, price_usd_per_hour = excluded.price_usd_per_hour
    where old.status = 'starting' and old.pod_id is null
    returning * into w;
    if not found then
        w := lock_worker(me.organization_id, p_worker ->> 'id');
        perform refuse('invalid_state', format(
            'worker %s exists and is %s: take another id', w.id,
            concat_ws(' with pod ', w.status, w.pod_id)));
    end if;
    return worker_json(w);
end $$;

-- From here on the pod costs.
create or replace function public.set_worker_pod(
    p_worker_id text, p_pod_id text, p_price_usd_per_hour numeric default null
) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
    w workers := lock_worker(me.organization_id, p_worker_id);
begin
    if w.status = 'terminated' then
        perform refuse('invalid_state', format('worker %s is terminated: its pod must end', w.id));
    end if;
    update workers
    set pod_id = p_pod_id, started_at = coalesce(started_at, now()),
        price_usd_per_hour = coalesce(p_price_usd_per_hour, price_usd_per_hour)
    where organization_id = w.organization_id and id = w.id
    returning * into w;
    return worker_json(w);
end $$;

-- The pod is known to be gone: it costs nothing from now on, and its worker has ended.
create or replace function public.end_worker_pod(p_worker_id text) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
    w workers := lock_worker(me.organization_id, p_worker_id);
begin
    update workers set ended_at = coalesce(ended_at, now())
    where organization_id = w.organization_id and id = w.id;
    return worker_json(change_worker_status(w, 'terminated'));
end $$;

-- What waits for a worker and for nothing else, by id, with what may still be spent on each: the least of what its own limit and its
-- key's budget leave, null without either.
create or replace function public.pending_jobs(p_limit integer default 1000, p_offset integer default 0)
returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
    running jsonb := running_by_label(me.organization_id);
begin
    return coalesce((
        select jsonb_agg(jsonb_build_object('job', job_json(j), 'owner', j.submitted_by_key,
            'usd_left', least(j.max_cost_usd - job_cost(j.organization_id, j.id), k.budget_usd - spent(k)))
            order by j.id)
        from (
            select * from jobs w where organization_id = me.organization_id and status = 'pending'
                and (not_before is null or not_before <= now())
                and (after is null or not exists (
                    select from jobs needed
                    where needed.organization_id = w.organization_id and needed.id = any (w.after)
                        and needed.status <> 'completed'))
                and (max_running is null or max_running > coalesce((running ->> label)::integer, 0))
                and not exists (
                    select from organizations where id = me.organization_id and paused_at is not null)
            order by id limit p_limit offset p_offset
        ) j join api_keys k on k.id = j.submitted_by_key
    ), '[]');
end $$;

create or replace function public.manager_state() returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
begin
    return (select manager_state from organizations where id = me.organization_id);
end $$;

create or replace function public.set_manager_state(p_state jsonb) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
begin
    perform check_text(p_state::text, 100000, 'the state');
    update organizations set manager_state = p_state where id = me.organization_id;
    return 'true';
end $$;

-- The part of it that everybody may know: prices and stock.
create or replace function public.market() returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member');
begin
    return (select manager_state -> 'market' from organizations where id = me.organization_id);
end $$;
