-- Runs, what they report, and their logs.
--
-- What is called all the time never scans a table: a connection keeps its plans, also those that it
-- made while the tables were small.

create or replace function public.start_script_run(p_spec jsonb) returns json
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member');
    j jobs := insert_job(read_spec(me, p_spec || '{"type": "script", "after": null}'));
begin
    if j.id is null then
        perform refuse('invalid_state', format(
            'job %s exists: a script run needs an id of its own', p_spec ->> 'id'));
    end if;
    perform note(me, 'job.script', j.id);
    return start_run(j.organization_id, j.id, null, null, null);
end $$;

create or replace function public.finish_run(
    p_run_id bigint, p_attempt integer, p_status text, p_error text default null,
    p_exit_code integer default null, p_cause text default null
) returns json
language plpgsql security definer set search_path = openweights, public, pg_temp
set enable_seqscan = off as $$
declare
    me api_keys := openweights.caller('admin', 'member', 'worker');
    locked record := lock_run(me.organization_id, p_run_id);
    r runs := locked.r;
    j jobs := locked.j;
    is_allowed boolean := check_reporter(me, r);
    final text := case j.status when 'canceled' then 'canceled' else p_status end;
    pause_s double precision;
begin
    if p_status is null or p_status not in ('completed', 'failed', 'canceled') then
        perform refuse('invalid_input', format('%L is no status that a run can end with', p_status));
    end if;
    if check_current(j, r, p_attempt, r.status = final and (
        j.status = final or (final = 'failed' and j.status = 'pending' and j.retries > 0)))
    then
        perform check_name(p_cause, 100, 'cause');
        r := end_run(r, final, 'finish', p_error, p_exit_code, p_cause);
        pause_s := case final when 'failed' then pause_before_retry(j, p_cause, p_exit_code) end;
        if pause_s is null then
            j := end_job(j, final, r.id);
        else
            update jobs
            set retries = retries + 1, not_before = now() + make_interval(secs => pause_s)
            where organization_id = j.organization_id and id = j.id;
            j := requeue_job(j, j.lost_attempts);
        end if;
    end if;
    return job_json(j);
end $$;

create or replace function public.release_run(
    p_run_id bigint, p_attempt integer, p_reason text, p_is_lost boolean default false
) returns json
language plpgsql security definer set search_path = openweights, public, pg_temp
set enable_seqscan = off as $$
declare
    me api_keys := openweights.caller('admin', 'member', 'worker');
    locked record := lock_run(me.organization_id, p_run_id);
    r runs := locked.r;
    j jobs := locked.j;
    is_allowed boolean := check_reporter(me, r);
begin
    if check_current(j, r, p_attempt, r.ended_by is not distinct from 'release') then
        if j.status = 'canceled' then
            r := end_run(r, 'canceled', 'release', p_reason);
            j := end_job(j, 'canceled', r.id);
        elsif p_is_lost then
            j := lose_run(j, r, 'release', p_reason);
        else
            r := end_run(r, 'failed', 'release', p_reason);
            update runs set is_given_back = true where id = r.id;
            j := requeue_job(j, j.lost_attempts);
        end if;
    end if;
    return job_json(j);
end $$;

-- ---- events

-- The events of a batch that the run does not have yet; returns how many.
create or replace function openweights.insert_events(r public.runs, p_events jsonb) returns bigint
language sql as $$
    with fresh as (
        insert into public.events (organization_id, job_id, run_id, key, data, created_at)
        select r.organization_id, r.job_id, r.id, e ->> 'key', e -> 'data',
            (e ->> 'created_at')::timestamptz
        from jsonb_array_elements(p_events) with ordinality as given (e, n)
        order by n
        on conflict (run_id, key) do nothing
        returning id, data
    ), latest as (
        insert into public.run_values as kept (run_id, data)
        select r.id, jsonb_object_agg(key, value order by id)
        from fresh, jsonb_each(data)
        having count(*) > 0
        on conflict (run_id) do update set data = kept.data || excluded.data
    )
    select count(*) from fresh
$$;

-- Files that an event names belong to the job from then on, so that its next worker may read its
-- checkpoints. A worker's key can only add what it has put itself: it could name any file.
create or replace function openweights.note_event_files(
    me public.api_keys, r public.runs, p_events jsonb
) returns void language sql as $$
    insert into public.job_files
    select r.organization_id, r.job_id, f
    from openweights.file_ids(p_events::text) f
    where me.role <> 'worker' or exists (
        select from public.file_keys k
        where k.organization_id = me.organization_id and k.key_id = me.id and k.file_id = f
    )
    on conflict do nothing
$$;

create or replace function public.append_events(p_run_id bigint, p_events jsonb) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp
set enable_seqscan = off as $$
declare
    me api_keys := openweights.caller('admin', 'member', 'worker');
    locked record := lock_run(me.organization_id, p_run_id);
    r runs := locked.r;
    j jobs := locked.j;
    is_allowed boolean := check_reporter(me, r);
    added bigint;
begin
    if jsonb_typeof(p_events) is distinct from 'array' or jsonb_path_exists(p_events,
        '$[*] ? (@.type() != "object" || !exists(@.created_at) || !exists(@.key) || !exists(@.data)
            || @.key.type() != "string" || @.data.type() != "object")')
    then
        perform refuse('invalid_input', 'events must be a list of {key, data, created_at} whose data are objects');
    end if;
    if r.attempt <> j.attempts then
        perform refuse('fenced', format(
            'run %s of job %s was replaced by attempt %s: its events are not taken any more',
            r.id, j.id, j.attempts));
    end if;
    perform check_event(e) from jsonb_array_elements(p_events) e;
    if r.event_bytes + octet_length(p_events::text) > 268435456 then
        perform refuse('invalid_input', format(
            'run %s has logged %s MB of events, and may log no more than 256', r.id, r.event_bytes >> 20));
    end if;
    added := insert_events(r, p_events);
    update runs set event_bytes = event_bytes + octet_length(p_events::text)
    where id = r.id and added > 0;
    perform note_event_files(me, r, p_events);
    if added > 0 and r.status <> 'in_progress' and j.status in ('completed', 'failed', 'canceled')
    then
        j := end_job(j, j.status, r.id);
    end if;
    return to_jsonb(added);
end $$;

create or replace function public.latest_values(
    p_keys text[] default null, p_job_id text default null, p_run_id bigint default null
) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member', 'worker');
    job text := p_job_id;
    run bigint := p_run_id;
begin
    if (p_job_id is null) = (p_run_id is null) then
        perform refuse('invalid_input', 'give either p_job_id or p_run_id');
    elsif p_run_id is not null then
        job := (find_run(me.organization_id, p_run_id)).job_id;
    elsif not exists (select from jobs where organization_id = me.organization_id and id = job) then
        perform refuse('not_found', format('no job %L in this organization', job));
    else
        select id into run from runs where organization_id = me.organization_id and job_id = job
        order by attempt desc limit 1;
    end if;
    perform check_reader(me, job);
    return coalesce((
        select jsonb_object_agg(key, value) from run_values v, jsonb_each(v.data)
        where v.run_id = run and (p_keys is null or key = any (p_keys))
    ), '{}');
end $$;

-- Raises when a worker's key asks about a job that its worker never held.
create or replace function openweights.check_reader(me public.api_keys, p_job_id text) returns void
language plpgsql as $$
begin
    if me.role = 'worker' and not exists (
        select from public.runs
        where organization_id = me.organization_id and job_id = p_job_id and worker_id = me.worker_id
    ) then
        perform openweights.refuse('forbidden', format('this key''s worker has never held job %s', p_job_id));
    end if;
end $$;

-- ---- logs

-- Bytes that are stored already are skipped, so that sending twice changes nothing.
create or replace function public.append_log(p_run_id bigint, p_offset bigint, p_data text)
returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp
set enable_seqscan = off as $$
declare
    me api_keys := openweights.caller('admin', 'member', 'worker');
    r runs := find_run(me.organization_id, p_run_id);
    is_allowed boolean := check_reporter(me, r);
    fresh bytea;
begin
    select * into r from runs where id = p_run_id for no key update;
    if p_offset is null or p_offset < 0 or p_offset > r.log_bytes then
        perform refuse('invalid_input', format(
            'offset %s is not within the log of run %s, which has %s bytes: send what is missing first',
            p_offset, r.id, r.log_bytes));
    end if;
    fresh := substring(decode(p_data, 'base64') from (r.log_bytes - p_offset + 1)::integer);
    if length(fresh) > 0 then
        perform check_log_end(r, r.log_bytes + length(fresh));
        insert into log_chunks values (r.id, r.log_bytes, fresh);
        update runs set log_bytes = log_bytes + length(fresh) where id = r.id
        returning * into r;
    end if;
    return to_jsonb(r.log_bytes);
end $$;

-- At most p_limit bytes, and at most 8 MiB, from p_offset, as base64.
create or replace function public.read_log(
    p_run_id bigint, p_offset bigint default 0, p_limit bigint default 1048576
) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member', 'worker');
    r runs := find_run(me.organization_id, p_run_id);
    until bigint := p_offset + least(p_limit, 8388608);
    found_bytes bytea;
begin
    perform check_reader(me, r.job_id);
    select string_agg(substring(data from greatest(p_offset - first_byte, 0)::integer + 1
        for (until - greatest(p_offset, first_byte))::integer), '' order by first_byte)
    into found_bytes
    from log_chunks
    where run_id = r.id and first_byte < until
        -- from the chunk in which p_offset lies
        and first_byte >= coalesce((
            select max(first_byte) from log_chunks where run_id = r.id and first_byte <= p_offset
        ), 0);
    -- encode() breaks lines
    return to_jsonb(coalesce(translate(encode(found_bytes, 'base64'), E'\n', ''), ''));
end $$;
