-- The life of jobs and runs, as changes inside a transaction that holds the lock on the job's row.
--
--     job:  pending -> in_progress -> completed | failed | canceled
--           pending -> failed                      a job that it waits for has failed
--           in_progress -> pending                 its run was released, or lost
--           failed | canceled -> pending           resubmitted or restarted
--     run:  in_progress -> completed | failed | canceled
--           failed -> in_progress                  a lease that ran out is won back
--
-- The lock on a job's row is the lock on all of the job: its runs, their events, its outputs. Locks
-- are taken in the order worker, job, and a claim skips the jobs that others have locked, so nobody
-- waits in a circle. A job in progress has exactly one run in progress, whose attempt number is the
-- job's `attempts`; a canceled job may still have one, until its worker has stopped it.

-- Text (`json`), not `jsonb`: it is only sent, and building and printing a tree takes twice as long.
create or replace function openweights.job_json(j public.jobs) returns json
language sql stable as $$
    select json_build_object(
        'id', j.id, 'organization_id', j.organization_id, 'type', j.type, 'script', j.script,
        'params', j.params, 'model', j.model, 'docker_image', j.docker_image,
        'requires_vram_gb', j.requires_vram_gb, 'allowed_hardware', j.allowed_hardware,
        'bundle_file', j.bundle_file, 'priority', j.priority, 'max_attempts', j.max_attempts,
        'timeout_at', j.timeout_at, 'max_cost_usd', j.max_cost_usd, 'status', j.status,
        'attempts', j.attempts, 'outputs', j.outputs, 'worker_id', j.worker_id,
        'after', j.after, 'failed_by', j.failed_by, 'not_before', j.not_before, 'label', j.label,
        'max_running', j.max_running, 'max_duration_s', j.max_duration_s,
        'stall_timeout_s', j.stall_timeout_s, 'retry', j.retry, 'retries', j.retries,
        'max_usd_per_hour', j.max_usd_per_hour,
        'created_at', j.created_at, 'updated_at', j.updated_at)
$$;

create or replace function openweights.run_json(r public.runs) returns json
language sql stable as $$
    select json_build_object(
        'id', r.id, 'job_id', r.job_id, 'worker_id', r.worker_id, 'attempt', r.attempt,
        'status', r.status, 'created_at', r.created_at, 'ended_at', r.ended_at,
        'error', r.error, 'exit_code', r.exit_code, 'cause', r.cause, 'log_bytes', r.log_bytes,
        'is_given_back', r.is_given_back)
$$;

create or replace function openweights.lock_job(p_organization uuid, p_job_id text)
returns public.jobs language plpgsql as $$
declare
    j public.jobs;
begin
    select * into j from public.jobs
    where organization_id = p_organization and id = p_job_id for no key update;
    if not found then
        perform openweights.refuse('not_found', format('no job %L in this organization', p_job_id));
    end if;
    return j;
end $$;

create or replace function openweights.find_run(p_organization uuid, p_run_id bigint)
returns public.runs language plpgsql as $$
declare
    r public.runs;
begin
    select * into r from public.runs where id = p_run_id and organization_id = p_organization;
    if not found then
        perform openweights.refuse('not_found', format('no run %s in this organization', p_run_id));
    end if;
    return r;
end $$;

-- A run and its job as (r, j), both as they are once the job is locked: afterwards nobody else
-- changes either. The lock on the run's row is there for that: after a wait for the job's,
-- PostgreSQL reads again only what it locks.
create or replace function openweights.lock_run(p_organization uuid, p_run_id bigint)
returns record language plpgsql as $$
declare
    locked record;
begin
    select r, j into locked
    from public.runs r join public.jobs j on j.organization_id = r.organization_id and j.id = r.job_id
    where r.id = p_run_id and r.organization_id = p_organization
    for no key update of j, r;
    if not found then
        perform openweights.refuse('not_found', format('no run %s in this organization', p_run_id));
    end if;
    return locked;
end $$;

-- ---- costs of runs

create or replace function openweights.run_cost(r public.runs) returns numeric
language sql stable as $$
    select coalesce(r.price_usd_per_hour, 0)
        * (extract(epoch from coalesce(r.ended_at, now()) - r.created_at)::numeric / 3600)
$$;

create or replace function openweights.charge(r public.runs, p_sign integer) returns void
language sql as $$
    update public.api_keys set spent_usd = spent_usd + p_sign * openweights.run_cost(r)
    where id = r.charged_key and r.price_usd_per_hour > 0
$$;

-- What a key has spent, with its runs that go on.
create or replace function openweights.spent(k public.api_keys) returns numeric
language sql stable as $$
    select k.spent_usd + coalesce(sum(openweights.run_cost(r)), 0)
    from public.runs r
    where r.charged_key = k.id and r.status = 'in_progress' and r.price_usd_per_hour > 0
$$;

-- In PL/pgSQL, so that queries that nearly never need it do not take it in and prepare for it.
create or replace function openweights.job_cost(p_organization uuid, p_job_id text) returns numeric
language plpgsql stable as $$
begin
    return (
        select coalesce(sum(openweights.run_cost(r)), 0) from public.runs r
        where r.organization_id = p_organization and r.job_id = p_job_id
    );
end $$;

-- Keys that have used up their budget.
create or replace function openweights.spent_keys(p_organization uuid) returns uuid[]
language plpgsql stable as $$
begin
    return array(
        select k.id from public.api_keys k
        where k.organization_id = p_organization and k.budget_usd is not null
            and openweights.spent(k) >= k.budget_usd
    );
end $$;

create or replace function openweights.check_budget(me public.api_keys) returns void
language plpgsql as $$
begin
    if me.budget_usd <= openweights.spent(me) then
        perform openweights.refuse('budget', format(
            'the key %s… has used up its budget of %s USD: ask an admin to raise it',
            me.prefix, me.budget_usd));
    end if;
end $$;

-- ---- changes

-- Of a job that is locked.
create or replace function openweights.start_run(
    p_organization uuid, p_job_id text, p_worker_id text, p_price numeric,
    p_lease_expires_at timestamptz
) returns json language plpgsql as $$
declare
    j public.jobs;
    r public.runs;
begin
    update public.jobs
    set status = 'in_progress', attempts = attempts + 1, worker_id = p_worker_id, updated_at = now()
    where organization_id = p_organization and id = p_job_id
    returning * into j;
    insert into public.runs (organization_id, job_id, worker_id, attempt, status, lease_expires_at,
        price_usd_per_hour, charged_key)
    values (j.organization_id, j.id, p_worker_id, j.attempts, 'in_progress', p_lease_expires_at,
        p_price, j.submitted_by_key)
    returning * into r;
    return json_build_object('job', openweights.job_json(j), 'run', openweights.run_json(r));
end $$;

create or replace function openweights.end_run(
    r public.runs, p_status text, p_ended_by text, p_error text, p_exit_code integer default null,
    p_cause text default null
) returns public.runs language plpgsql as $$
begin
    update public.runs
    set status = p_status, ended_by = p_ended_by, error = left(p_error, 4000), exit_code = p_exit_code,
        cause = p_cause, ended_at = now(), lease_expires_at = null
    where id = r.id;
    r.status := p_status;
    r.ended_at := now();
    if r.price_usd_per_hour > 0 then
        perform openweights.charge(r, 1);
    end if;
    return r;
end $$;

-- Put a job into a final status, or keep it there, with the outputs of its last run.
create or replace function openweights.end_job(j public.jobs, p_status text, p_run_id bigint)
returns public.jobs language plpgsql as $$
begin
    update public.jobs
    set status = p_status, worker_id = null, updated_at = now(),
        outputs = coalesce((select data from public.run_values where run_id = p_run_id), '{}')
    where organization_id = j.organization_id and id = j.id
    returning * into j;
    if p_status <> 'completed' then
        perform openweights.fail_dependents(j.organization_id, j.id, p_status);
    end if;
    return j;
end $$;

-- Put a job back to pending; `p_lost` of its allowance are used up from now on.
create or replace function openweights.requeue_job(j public.jobs, p_lost integer)
returns public.jobs language plpgsql as $$
begin
    update public.jobs
    set status = 'pending', outputs = null, worker_id = null, failed_by = null,
        lost_attempts = p_lost, updated_at = now()
    where organization_id = j.organization_id and id = j.id
    returning * into j;
    return j;
end $$;

-- End the run that a canceled job may still have, because nobody has to wait for it.
create or replace function openweights.end_open_run(j public.jobs) returns void
language plpgsql as $$
declare
    r public.runs;
begin
    select * into r from public.runs
    where organization_id = j.organization_id and job_id = j.id and status = 'in_progress';
    if found then
        r := openweights.end_run(r, 'canceled', 'client', null);
    end if;
end $$;

-- End a run whose worker is gone, or that hangs: its job waits again, unless its allowance is used up.
create or replace function openweights.lose_run(
    j public.jobs, r public.runs, p_ended_by text, p_reason text default null
) returns public.jobs language plpgsql as $$
declare
    lost integer := j.lost_attempts + 1;
    reason text := coalesce(p_reason, format(case p_ended_by
        when 'lease' then 'worker %s was silent for longer than its lease'
        else 'worker %s is gone' end, r.worker_id));
begin
    if j.status = 'canceled' then
        r := openweights.end_run(r, 'canceled', p_ended_by, reason);
        j := openweights.end_job(j, 'canceled', r.id);
    elsif lost >= j.max_attempts then
        reason := format('%s; the job has lost %s of at most %s runs', reason, lost, j.max_attempts);
        r := openweights.end_run(r, 'failed', p_ended_by, reason);
        update public.jobs set lost_attempts = lost
        where organization_id = j.organization_id and id = j.id;
        j := openweights.end_job(j, 'failed', r.id);
    else
        r := openweights.end_run(r, 'failed', p_ended_by, reason);
        j := openweights.requeue_job(j, lost);
    end if;
    return j;
end $$;

-- The run that a worker holds, with the lock on its job; null when there is none.
create or replace function openweights.held_run(p_organization uuid, p_worker_id text)
returns public.runs language plpgsql as $$
declare
    r public.runs;
begin
    select * into r from public.runs
    where organization_id = p_organization and worker_id = p_worker_id and status = 'in_progress';
    if not found then
        return null;
    end if;
    perform openweights.lock_job(p_organization, r.job_id);
    -- It may have been ended while this waited for the lock.
    select * into r from public.runs where id = r.id and status = 'in_progress';
    return r;
end $$;

create or replace function openweights.lose_held_run(p_organization uuid, p_worker_id text)
returns void language plpgsql as $$
declare
    r public.runs := openweights.held_run(p_organization, p_worker_id);
begin
    if r.id is not null then
        perform openweights.lose_run(openweights.lock_job(p_organization, r.job_id), r, 'worker');
    end if;
end $$;

-- End runs whose lease is over, except that of the worker that asks. A few at a time, and only
-- those that nobody else is looking at: this is a part of every claim.
create or replace function openweights.lose_expired_runs(p_organization uuid, p_except text)
returns void language plpgsql as $$
declare
    found_id bigint;
    r public.runs;
    j public.jobs;
begin
    for found_id in
        select id from public.runs
        where organization_id = p_organization and status = 'in_progress'
            and lease_expires_at < now() and worker_id is distinct from p_except
        order by lease_expires_at limit 32
    loop
        select jobs.* into j
        from public.jobs join public.runs on runs.organization_id = jobs.organization_id
            and runs.job_id = jobs.id
        where runs.id = found_id
        for no key update of jobs skip locked;
        continue when not found;
        -- Under the lock: it may have been renewed, or ended, since it was found.
        select * into r from public.runs
        where id = found_id and status = 'in_progress' and lease_expires_at < now();
        if found then
            perform openweights.lose_run(j, r, 'lease');
        end if;
    end loop;
end $$;

-- Whether the run is still to be ended; false when just this was done before. Raises `fenced` when
-- the attempt is not the job's newest, or its run was ended in another way.
create or replace function openweights.check_current(
    j public.jobs, r public.runs, p_attempt integer, p_is_repeated boolean
) returns boolean language plpgsql as $$
begin
    if r.attempt = j.attempts and p_attempt = j.attempts then
        if r.status = 'in_progress' then
            return true;
        elsif p_is_repeated then
            return false;
        end if;
    end if;
    perform openweights.refuse('fenced', format(
        'attempt %s (run %s) is no longer the current one of job %s: that is attempt %s, job %s, run %s',
        p_attempt, r.id, j.id, j.attempts, j.status, r.status));
end $$;
