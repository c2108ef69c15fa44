-- Jobs: submission, and what people do to them.

-- Ids of files that a JSON text names, wherever they stand in it.
create or replace function openweights.file_ids(p_text text) returns setof text
language sql immutable as $$
    select distinct m[1]
    from regexp_matches(p_text, '[A-Za-z0-9_-]+:file-[0-9a-f]{12}', 'g') as m
$$;

-- Until the transaction ends nobody removes the files and the jobs that a job names: who collects
-- garbage, or deletes a job, sees neither this job nor that its files are needed before that. A file
-- that was used in the last minutes is in no danger, and so is not locked by everybody who names it.
create or replace function openweights.hold_named(j public.jobs) returns void
language plpgsql as $$
declare
    old text[] := array(
        select f.id from public.files f join public.job_files n
            on n.organization_id = f.organization_id and n.file_id = f.id
        where n.organization_id = j.organization_id and n.job_id = j.id
            and f.used_at < now() - interval '10 minutes');
    named text[] := array(
        select o.id from public.jobs o
        where o.organization_id = j.organization_id and o.id <> j.id and o.id in (
            select split_part(value #>> '{}', '/', 1)
            from jsonb_path_query(j.params, 'strict $.**') value
            where jsonb_typeof(value) = 'string'));
    gone text;
begin
    perform from public.files where organization_id = j.organization_id and id = any (old)
    order by id for no key update;
    update public.files set used_at = now() where organization_id = j.organization_id and id = any (old);
    perform from public.jobs where organization_id = j.organization_id and id = any (named)
    order by id for key share;
    select needed into gone from unnest(old) needed
    where not exists (
        select from public.files where organization_id = j.organization_id and id = needed)
    union all
    select needed from unnest(named) needed
    where not exists (
        select from public.jobs where organization_id = j.organization_id and id = needed);
    if found then
        perform openweights.refuse('invalid_state', format(
            '%s, which job %s names, was removed at this moment: put it there again', gone, j.id));
    end if;
end $$;

-- Called for what people submit: a worker may read the files that its job names.
create or replace function openweights.note_job_files(j public.jobs) returns void
language plpgsql as $$
begin
    insert into public.job_files
    select j.organization_id, j.id, f
    from openweights.file_ids(concat_ws(' ', j.params, j.bundle_file, j.script)) f
    on conflict do nothing;
    perform openweights.hold_named(j);
end $$;

-- A row of `jobs` as a submission describes it; raises on what no job can be.
create or replace function openweights.read_spec(me public.api_keys, p_spec jsonb)
returns public.jobs language plpgsql as $$
declare
    s public.jobs;
begin
    if jsonb_typeof(p_spec) is distinct from 'object' then
        perform openweights.refuse('invalid_input', 'p_spec must be an object with the fields of a job');
    end if;
    -- Before the rest is read, which would say it less clearly.
    if coalesce(p_spec ->> 'id', '') !~ '^[^\s/]+( [^\s/]+)*$' or length(p_spec ->> 'id') > 250 then
        perform openweights.refuse('invalid_input', format('%L cannot be the id of a job', p_spec ->> 'id'));
    elsif coalesce(p_spec ->> 'type', '')
        not in ('fine-tuning', 'inference', 'script', 'api', 'custom')
    then
        perform openweights.refuse('invalid_input', format('%L is no type of job', p_spec ->> 'type'));
    end if;
    s := jsonb_populate_record(null::public.jobs, p_spec - 'status');
    s.organization_id := me.organization_id;
    s.submitted_by_key := me.id;
    s.docker_image := coalesce(s.docker_image, '');
    s.requires_vram_gb := coalesce(s.requires_vram_gb, 0);
    s.priority := coalesce(s.priority, 0);
    s.max_attempts := coalesce(s.max_attempts, 3);
    s.after := nullif(s.after, '{}');
    if s.script is null or jsonb_typeof(s.params) is distinct from 'object' then
        perform openweights.refuse('invalid_input', 'a job needs a script, and params that are an object');
    end if;
    perform openweights.check_spec(s);
    return s;
end $$;

create or replace function openweights.insert_job(s public.jobs) returns public.jobs
language plpgsql as $$
declare
    j public.jobs;
begin
    insert into public.jobs (organization_id, id, type, script, params, model, docker_image,
        requires_vram_gb, allowed_hardware, bundle_file, priority, max_attempts, timeout_at,
        max_cost_usd, after, not_before, label, max_running, max_duration_s, stall_timeout_s, retry,
        max_usd_per_hour, status, submitted_by_key)
    values (s.organization_id, s.id, s.type, s.script, s.params, s.model, s.docker_image,
        s.requires_vram_gb, s.allowed_hardware, s.bundle_file, s.priority, s.max_attempts,
        s.timeout_at, s.max_cost_usd, s.after, s.not_before, s.label, s.max_running,
        s.max_duration_s, s.stall_timeout_s, s.retry, s.max_usd_per_hour, 'pending',
        s.submitted_by_key)
    on conflict do nothing
    returning * into j;
    if found then
        perform openweights.note_job_files(j);
    end if;
    return j;
end $$;

-- A pending job takes over where and when it may run, not what it does; and that only from the key that pays
-- for it, or from an admin, who pays from then on. To others it is the job that is there already.
create or replace function openweights.sync_job(
    j public.jobs, s public.jobs, me public.api_keys
) returns public.jobs
language plpgsql as $$
begin
    if me.role <> 'admin' and me.id <> j.submitted_by_key then
        return j;
    end if;
    if s.params ? 'cloud_type' then
        s.params := jsonb_set(j.params, '{cloud_type}', s.params -> 'cloud_type');
    else
        s.params := j.params;
    end if;
    if (j.docker_image, j.requires_vram_gb, j.allowed_hardware, j.bundle_file, j.params, j.after,
        j.not_before, j.label, j.max_running, j.max_duration_s, j.stall_timeout_s, j.retry,
        j.max_usd_per_hour)
        is distinct from
        (s.docker_image, s.requires_vram_gb, s.allowed_hardware, s.bundle_file, s.params, s.after,
        s.not_before, s.label, s.max_running, s.max_duration_s, s.stall_timeout_s, s.retry,
        s.max_usd_per_hour)
    then
        if j.after is distinct from s.after then
            perform openweights.check_after(j.organization_id, j.id, s.after);
        end if;
        update public.jobs
        set docker_image = s.docker_image, requires_vram_gb = s.requires_vram_gb,
            allowed_hardware = s.allowed_hardware, bundle_file = s.bundle_file, params = s.params,
            after = s.after, not_before = s.not_before, label = s.label,
            max_running = s.max_running, max_duration_s = s.max_duration_s,
            stall_timeout_s = s.stall_timeout_s, retry = s.retry,
            max_usd_per_hour = s.max_usd_per_hour, submitted_by_key = me.id, updated_at = now()
        where organization_id = j.organization_id and id = j.id
        returning * into j;
        perform openweights.note_job_files(j);
        perform openweights.note(me, 'job.change', j.id);
    end if;
    return j;
end $$;

-- An ended job starts anew with everything of the submission; attempt numbers go on.
create or replace function openweights.replace_job(j public.jobs, s public.jobs) returns public.jobs
language plpgsql as $$
begin
    perform openweights.check_after(j.organization_id, j.id, s.after);
    perform openweights.end_open_run(j);
    update public.jobs
    set type = s.type, script = s.script, params = s.params, model = s.model,
        docker_image = s.docker_image, requires_vram_gb = s.requires_vram_gb,
        allowed_hardware = s.allowed_hardware, bundle_file = s.bundle_file, priority = s.priority,
        max_attempts = s.max_attempts, timeout_at = s.timeout_at, max_cost_usd = s.max_cost_usd,
        after = s.after, not_before = s.not_before, label = s.label, max_running = s.max_running,
        max_duration_s = s.max_duration_s, stall_timeout_s = s.stall_timeout_s, retry = s.retry,
        max_usd_per_hour = s.max_usd_per_hour, retries = 0, submitted_by_key = s.submitted_by_key
    where organization_id = j.organization_id and id = j.id;
    j := openweights.requeue_job(j, 0);
    perform openweights.revive_dependents(j.organization_id, j.id);
    perform openweights.note_job_files(j);
    return j;
end $$;

create or replace function public.submit_job(p_spec jsonb) returns json
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member');
    s jobs := read_spec(me, p_spec);
    j jobs;
begin
    perform check_budget(me);
    perform hold_after(me.organization_id, s.after);
    j := insert_job(s);
    if j.id is not null then
        perform check_after(me.organization_id, s.id, s.after);
        perform note(me, 'job.submit', s.id);
    else
        j := lock_job(me.organization_id, s.id);
        if j.status in ('failed', 'canceled') then
            perform note(me, 'job.resubmit', s.id);
        end if;
        j := case j.status
            when 'pending' then sync_job(j, s, me)
            when 'failed' then replace_job(j, s)
            when 'canceled' then replace_job(j, s)
            else j
        end;
    end if;
    return job_json(j);
end $$;

create or replace function public.cancel_job(p_job_id text) returns json
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member');
    j jobs := lock_job(me.organization_id, p_job_id);
    last_run bigint;
begin
    if j.status in ('completed', 'failed') then
        perform refuse('invalid_state', format('job %s has %s: nothing is left to cancel', j.id, j.status));
    elsif j.status <> 'canceled' then
        perform note(me, 'job.cancel', j.id, jsonb_build_object('status', j.status));
    end if;
    if j.status = 'in_progress' and j.worker_id is null then
        -- No worker will ever report that it has stopped a script's run.
        select id into last_run from runs
        where organization_id = j.organization_id and job_id = j.id and attempt = j.attempts;
        perform end_open_run(j);
        j := end_job(j, 'canceled', last_run);
    elsif j.status <> 'canceled' then
        update jobs set status = 'canceled', worker_id = null, updated_at = now()
        where organization_id = j.organization_id and id = j.id
        returning * into j;
        perform fail_dependents(j.organization_id, j.id, 'canceled');
    end if;
    return job_json(j);
end $$;

create or replace function public.restart_job(p_job_id text) returns json
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member');
    j jobs;
begin
    perform hold_after(me.organization_id, (
        select after from jobs where organization_id = me.organization_id and id = p_job_id));
    j := lock_job(me.organization_id, p_job_id);
    if j.status not in ('failed', 'canceled') then
        perform refuse('invalid_state', format(
            'job %s is %s: only a failed or canceled job can be restarted', j.id, j.status));
    elsif j.type = 'script' then
        perform refuse('invalid_state', format(
            'job %s ran outside any worker: run its script again instead', j.id));
    end if;
    perform check_budget(me);
    perform check_none_failed(j.organization_id, j.after);
    perform hold_named(j);
    perform end_open_run(j);
    perform note(me, 'job.restart', j.id);
    -- Who restarts it pays for it, and wants it now.
    update jobs set submitted_by_key = me.id, not_before = null, retries = 0
    where organization_id = j.organization_id and id = j.id;
    j := requeue_job(j, 0);
    perform revive_dependents(j.organization_id, j.id);
    return job_json(j);
end $$;

create or replace function public.set_timeout(p_job_id text, p_timeout_at timestamptz) returns json
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member');
    is_moment boolean := check_moment(p_timeout_at, 'timeout_at');
    j jobs := lock_job(me.organization_id, p_job_id);
begin
    update jobs set timeout_at = p_timeout_at, updated_at = now()
    where organization_id = j.organization_id and id = j.id
    returning * into j;
    perform note(me, 'job.timeout', j.id, jsonb_build_object('timeout_at', p_timeout_at));
    return job_json(j);
end $$;
