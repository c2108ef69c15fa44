-- When a pending job may be taken, and what becomes of it when that can never be.
--
-- A job waits until all jobs of its `after` have completed, which they stay. When one of them fails or
-- is canceled, it fails, and so do those that wait for it; `failed_by` remembers why, so that they come
-- back when that one is queued again. The words are those of openweights/backends/scheduling.py.

-- Until the transaction ends none of these jobs ends: one that ended now would not see who is just
-- about to wait for it. Taken before the lock on the job that waits, as their ends take them.
create or replace function openweights.hold_after(p_organization uuid, p_after text[]) returns void
language plpgsql as $$
begin
    if p_after is not null then
        perform from public.jobs where organization_id = p_organization and id = any (p_after)
        order by id for share;
    end if;
end $$;

-- The ids from a job back to itself, if it waited for these; null without a cycle.
create or replace function openweights.cycle_through(p_organization uuid, p_id text, p_after text[])
returns text[] language plpgsql stable as $$
declare
    came_from jsonb := coalesce((select jsonb_object_agg(needed, p_id) from unnest(p_after) needed), '{}');
    waiting text[] := array(select jsonb_object_keys(came_from));
    needed text;
    path text[] := array[p_id];
begin
    while cardinality(waiting) > 0 loop
        if waiting[1] = p_id then
            loop
                path := (came_from ->> path[1]) || path;
                exit when path[1] = p_id;
            end loop;
            return path;
        end if;
        for needed in
            select unnest(after) from public.jobs where organization_id = p_organization and id = waiting[1]
        loop
            if not came_from ? needed then
                came_from := came_from || jsonb_build_object(needed, waiting[1]);
                waiting := waiting || needed;
            end if;
        end loop;
        waiting := waiting[2:];
    end loop;
    return null;
end $$;

-- Raises unless the job can wait for these, which are held.
create or replace function openweights.check_after(p_organization uuid, p_id text, p_after text[])
returns boolean language plpgsql as $$
declare
    unknown text;
    path text[];
begin
    select needed into unknown
    from unnest(p_after) needed
    where needed <> p_id and not exists (
        select from public.jobs where organization_id = p_organization and id = needed
    );
    if found then
        perform openweights.refuse('invalid_input', format(
            'after: there is no job %L; correct the id', unknown));
    end if;
    path := openweights.cycle_through(p_organization, p_id, p_after);
    if path is not null then
        perform openweights.refuse('invalid_input', format(
            'after: these jobs would wait for one another: %s', array_to_string(path, ' waits for ')));
    end if;
    return openweights.check_none_failed(p_organization, p_after);
end $$;

-- Raises when one of the jobs that a job waits for has failed or was canceled. (One that is gone had
-- completed: who waits for a job keeps it.)
create or replace function openweights.check_none_failed(p_organization uuid, p_after text[])
returns boolean language plpgsql as $$
declare
    ended public.jobs := openweights.ended_badly(p_organization, p_after);
begin
    if ended.id is not null then
        perform openweights.refuse('invalid_state', format(
            'after: job %s is %s: restart it first, with `ow restart %s`',
            ended.id, ended.status, ended.id));
    end if;
    return true;
end $$;

-- The first of these jobs that has failed or was canceled.
create or replace function openweights.ended_badly(p_organization uuid, p_ids text[])
returns public.jobs language plpgsql stable as $$
declare
    j public.jobs;
begin
    select * into j from public.jobs
    where organization_id = p_organization and id = any (p_ids) and status in ('failed', 'canceled')
    order by array_position(p_ids, id::text) limit 1;
    return j;
end $$;

create or replace function openweights.reason_of_dependent(p_job_id text, p_status text)
returns text language sql immutable as $$
    select format('it was to come after job %s, which %s; it is restarted with that one', p_job_id,
        case p_status when 'canceled' then 'was canceled' else 'has failed' end)
$$;

-- A job has ended with this status, failed or canceled: fail what waits for it, and so on.
create or replace function openweights.fail_dependents(
    p_organization uuid, p_job_id text, p_status text
) returns void language plpgsql as $$
declare
    ended text[] := array[p_job_id];
    how text := p_status;
    dependent text;
begin
    while cardinality(ended) > 0 loop
        for dependent in
            select id from public.jobs
            where organization_id = p_organization and status = 'pending' and after is not null
                and ended[1] = any (after)
            order by id
        loop
            update public.jobs
            set status = 'failed', failed_by = ended[1], updated_at = now(),
                outputs = jsonb_build_object('error', openweights.reason_of_dependent(ended[1], how))
            where organization_id = p_organization and id = dependent and status = 'pending';
            if found then
                ended := ended || dependent;
            end if;
        end loop;
        ended := ended[2:];
        how := 'failed';
    end loop;
end $$;

-- A failed or canceled job is pending again: so is what had failed because of it, and so on.
create or replace function openweights.revive_dependents(p_organization uuid, p_job_id text)
returns void language plpgsql as $$
declare
    revived text[] := array[p_job_id];
    j public.jobs;
    ended public.jobs;
begin
    while cardinality(revived) > 0 loop
        for j in
            select * from public.jobs
            where organization_id = p_organization and status = 'failed' and after is not null
                and failed_by = revived[1]
            order by id for no key update
        loop
            ended := openweights.ended_badly(p_organization, j.after);
            if ended.id is null then
                j := openweights.requeue_job(j, 0);
                revived := revived || j.id::text;
            else
                update public.jobs
                set failed_by = ended.id, updated_at = now(), outputs = jsonb_build_object(
                    'error', openweights.reason_of_dependent(ended.id, ended.status))
                where organization_id = j.organization_id and id = j.id;
            end if;
        end loop;
        revived := revived[2:];
    end loop;
end $$;

-- ---- jobs with the same label

-- Whether fewer jobs of this label run than the job says.
create or replace function openweights.has_room(p_organization uuid, p_label text, p_most integer)
returns boolean language plpgsql volatile as $$
begin
    return (
        select count(*) from public.jobs
        where organization_id = p_organization and label = p_label and status = 'in_progress'
    ) < p_most;
end $$;

-- How many jobs of each label run.
create or replace function openweights.running_by_label(p_organization uuid) returns jsonb
language plpgsql stable as $$
begin
    return coalesce((
        select jsonb_object_agg(label, running) from (
            select label, count(*) as running from public.jobs
            where organization_id = p_organization and label is not null and status = 'in_progress'
            group by label
        ) as counted
    ), '{}');
end $$;

-- Of claims for the same label one goes on after the other, so that each sees what those before have
-- taken: a statement of a volatile function sees all that is committed by then.
create or replace function openweights.wait_for_label(p_organization uuid, p_label text) returns void
language plpgsql as $$
begin
    perform pg_advisory_xact_lock(hashtextextended(p_organization || ' ' || p_label, 0));
end $$;

-- ---- retries of a job's own failures

-- Seconds until the job may be tried again after a failure; null when it has failed for good. The
-- pause doubles with each retry, up to a day.
create or replace function openweights.pause_before_retry(
    j public.jobs, p_cause text, p_exit_code integer
) returns double precision language sql immutable as $$
    select least((j.retry ->> 'backoff_s')::double precision * power(2::double precision, j.retries), 86400)
    where j.retries < (j.retry ->> 'max')::integer
        and (j.retry -> 'on' ? p_cause
            or (j.retry -> 'on' ? 'any' and p_exit_code is not null)
            or j.retry -> 'on' ? ('exit:' || case when p_exit_code < 0 then 128 - p_exit_code
                else p_exit_code end))
$$;

-- ---- jobs that hang

-- Whether a run has given no sign of life for as long as its job allows; notes what it has given.
create or replace function openweights.is_stalled(j public.jobs, r public.runs) returns boolean
language plpgsql as $$
declare
    heard bigint;
begin
    if j.stall_timeout_s is null then
        return false;
    end if;
    -- As it is now: what a statement took before it waited for the lock may be old.
    select log_bytes + event_bytes into heard from public.runs where id = r.id;
    if heard <> r.heard_bytes then
        update public.runs set heard_bytes = heard, quiet_since = now() where id = r.id;
        return false;
    end if;
    return now() - coalesce(r.quiet_since, r.created_at) >= make_interval(secs => j.stall_timeout_s);
end $$;

create or replace function public.touch_run(p_run_id bigint) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp
set enable_seqscan = off as $$
declare
    me api_keys := openweights.caller('admin', 'member', 'worker');
    r runs := find_run(me.organization_id, p_run_id);
    is_allowed boolean := check_reporter(me, r);
begin
    update runs set quiet_since = now() where id = r.id and status = 'in_progress';
    return to_jsonb(found);
end $$;

-- ---- the queue of an organization

create or replace function openweights.queue_json(p_organization uuid) returns jsonb
language sql stable as $$
    select jsonb_build_object('paused_at', paused_at, 'max_duration_s', max_duration_s)
    from public.organizations where id = p_organization
$$;

create or replace function public.queue_state() returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member');
begin
    return queue_json(me.organization_id);
end $$;

-- What there is before a job, of which `p_job` has id, priority, created_at, label and after; before one
-- that comes last, if it is null. Rows are counted here, so that a long queue need not travel.
create or replace function public.place_in_queue(p_job jsonb default null) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp
set enable_seqscan = off as $$
declare
    me api_keys := openweights.caller('admin', 'member');
    o organizations;
    running jsonb := running_by_label(me.organization_id);
    asked jobs := jsonb_populate_record(null::jobs, coalesce(p_job, '{}'));
    ahead jsonb;
begin
    select * into o from organizations where id = me.organization_id;
    select jsonb_build_object(
            'total', count(*), 'ending', count(*) filter (where ends),
            'first', (array_agg(id order by priority desc, created_at, id) filter (where ends))[1],
            'questions', count(*) filter (where asks),
            'first_question', (array_agg(id order by priority desc, created_at, id) filter (where asks))[1],
            'question_gb', coalesce((array_agg(requires_vram_gb order by priority desc, created_at, id)
                filter (where asks))[1], 0))
    into ahead
    from (
        select j.id::text collate "C" as id, j.priority, j.created_at, j.requires_vram_gb,
            j.type <> 'api' as ends, is_question(j.type, j.priority) as asks
        from jobs j
        where j.organization_id = o.id and j.status = 'pending' and o.paused_at is null
            and (p_job is null or j.id <> asked.id and (-j.priority, j.created_at, j.id::text collate "C")
                < (-asked.priority, asked.created_at, asked.id::text collate "C"))
            and (j.not_before is null or j.not_before <= now())
            and (j.after is null or not exists (
                select from jobs needed
                where needed.organization_id = o.id and needed.id = any (j.after)
                    and needed.status <> 'completed'))
            and (j.max_running is null or j.max_running > coalesce((running ->> j.label)::integer, 0))
    ) due;
    return jsonb_build_object(
        'ahead', ahead,
        'like_it', (
            select count(*) from jobs
            where organization_id = o.id and label = asked.label and status = 'in_progress'
                and id <> asked.id),
        'needed', coalesce((
            select jsonb_agg(jsonb_build_array(j.id, j.status) order by array_position(asked.after, j.id::text))
            from jobs j
            where j.organization_id = o.id and j.id = any (asked.after) and j.id <> asked.id
                and j.status in ('pending', 'in_progress')), '[]'));
end $$;

-- While it is paused no worker gets a new job, and no pod is started.
create or replace function public.set_paused(p_is_paused boolean) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
begin
    update organizations set paused_at = case when p_is_paused then coalesce(paused_at, now()) end
    where id = me.organization_id;
    perform note(me, case when p_is_paused then 'queue.pause' else 'queue.resume' end, null);
    return queue_json(me.organization_id);
end $$;

-- For jobs that do not say how long a run of theirs may take; null for no limit.
create or replace function public.set_max_duration(p_seconds double precision) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
    is_number boolean := check_number(p_seconds::numeric, 1, 1000000000, 'max_duration');
begin
    update organizations set max_duration_s = p_seconds where id = me.organization_id;
    perform note(me, 'queue.max_duration', null, jsonb_build_object('seconds', p_seconds));
    return queue_json(me.organization_id);
end $$;
