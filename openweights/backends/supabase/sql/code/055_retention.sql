-- What nobody needs any more: jobs when they are deleted, and by age files, checkpoints and logs.

-- Raises when a run's log would be longer than the organization's may be.
create or replace function openweights.check_log_end(r public.runs, p_end bigint) returns void
language plpgsql as $$
declare
    most bigint;
begin
    select log_limit_mb * 1048576::bigint into most from public.organizations where id = r.organization_id;
    if p_end > most then
        perform openweights.refuse('invalid_input', format(
            'the log of run %s would have %s bytes, and may have no more than %s', r.id, p_end, most));
    end if;
end $$;

-- Whether a job waits or runs, or its worker has not stopped it yet.
create or replace function openweights.is_active(j public.jobs) returns boolean
language sql stable as $$
    select j.status in ('pending', 'in_progress') or exists (
        select from public.runs r
        where r.organization_id = j.organization_id and r.job_id = j.id and r.status = 'in_progress'
    )
$$;

-- What was submitted, in which a job names files and other jobs.
create or replace function openweights.job_text(j public.jobs) returns text
language sql immutable as $$
    select concat_ws(' ', j.params, j.script, j.model, j.bundle_file, j.after)
$$;

create or replace function public.delete_job(p_job_id text) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member');
    j jobs;
    user_id text;
begin
    select * into j from jobs where organization_id = me.organization_id and id = p_job_id for update;
    if not found then
        return 'false';
    elsif me.role <> 'admin' and me.member_id <> (select member_id from api_keys where id = j.submitted_by_key)
    then
        perform refuse('forbidden', format('job %s is somebody else''s: an admin may delete it', j.id));
    elsif is_active(j) then
        perform refuse('invalid_state', format('job %s is %s: %s', j.id, j.status, case j.status
            when 'canceled' then 'its worker is still stopping it; try again in a moment'
            else 'cancel it first' end));
    end if;
    select o.id into user_id from jobs o
    where o.organization_id = j.organization_id and o.id <> j.id and is_active(o)
        and position(j.id in job_text(o)) > 0
    limit 1;
    if found then
        perform refuse('invalid_state', format(
            'job %s is named by job %s, which has not ended: wait for that one', j.id, user_id));
    end if;
    delete from log_chunks c using runs r
    where c.run_id = r.id and r.organization_id = j.organization_id and r.job_id = j.id;
    delete from run_values v using runs r
    where v.run_id = r.id and r.organization_id = j.organization_id and r.job_id = j.id;
    delete from events where organization_id = j.organization_id and job_id = j.id;
    delete from runs where organization_id = j.organization_id and job_id = j.id;
    delete from job_files where organization_id = j.organization_id and job_id = j.id;
    delete from jobs where organization_id = j.organization_id and id = j.id;
    perform note(me, 'job.delete', j.id);
    return 'true';
end $$;

-- Whether a job keeps a file that is noted with it: all of them, but for the checkpoints of a job
-- that ended before that moment and that no job names which waits or runs.
create or replace function openweights.keeps(j public.jobs, f public.files, p_before timestamptz)
returns boolean language sql stable as $$
    select f.purpose <> 'checkpoint' or j.updated_at >= p_before or openweights.is_active(j)
        or position(f.id in openweights.job_text(j)) > 0
        or exists (
            select from public.events e
            where e.organization_id = j.organization_id and e.job_id = j.id
                and e.data ->> 'type' = 'checkpoint' and e.data ->> 'file' = f.id
                and e.data ->> 'kept' = 'true'
        )
        or exists (
            select from public.jobs o
            where o.organization_id = j.organization_id and o.status in ('pending', 'in_progress')
                and position(j.id in openweights.job_text(o)) > 0
        )
$$;

-- Objects of the organization without a record, put before that moment: uploads that broke off, and
-- what has lost its record. The service removes them.
create or replace function openweights.stray_objects(p_organization uuid, p_before timestamptz)
returns jsonb language sql stable as $$
    select coalesce(jsonb_agg(substring(name from position('/' in name) + 1)), '[]')
    from storage.objects
    where bucket_id = 'files' and split_part(name, '/', 1) = p_organization::text
        and greatest(created_at, updated_at) < p_before and not openweights.has_record(name)
$$;

-- Removes what nobody has needed for so long, and answers what it was, with the objects that are to
-- go. Of logs a line is left that says so.
create or replace function public.collect_garbage(p_keep_s double precision, p_dry_run boolean)
returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
    before timestamptz := now() - make_interval(secs => greatest(p_keep_s, 3600));
    doomed text[];
    old_runs bigint[];
    answer jsonb;
begin
    select coalesce(array_agg(f.id), '{}') into doomed
    from files f
    where f.organization_id = me.organization_id and greatest(f.used_at, f.created_at) < before
        and not exists (
            select from job_files jf join jobs j
                on j.organization_id = jf.organization_id and j.id = jf.job_id
            where jf.organization_id = f.organization_id and jf.file_id = f.id and keeps(j, f, before)
        );
    select coalesce(array_agg(id), '{}') into old_runs
    from runs
    where organization_id = me.organization_id and ended_at < before and log_bytes > 1024;
    answer := jsonb_build_object(
        'files', cardinality(doomed),
        'file_bytes', (select coalesce(sum(bytes), 0) from files
            where organization_id = me.organization_id and id = any (doomed)),
        'logs', cardinality(old_runs),
        'log_bytes', (select coalesce(sum(log_bytes), 0) from runs where id = any (old_runs)));
    if p_dry_run then
        return answer || '{"objects": []}';
    end if;
    -- Again under the lock of each: it may have been put anew since.
    delete from files where organization_id = me.organization_id and id = any (doomed)
        and used_at < before;
    perform drop_log(id) from unnest(old_runs) id;
    if cardinality(doomed) + cardinality(old_runs) > 0 then
        perform note(me, 'store.gc', null, answer);
    end if;
    return answer || jsonb_build_object('objects', stray_objects(me.organization_id, before));
end $$;

create or replace function openweights.drop_log(p_run_id bigint) returns void
language plpgsql as $$
declare
    bytes bigint;
    line bytea;
begin
    select log_bytes into bytes from public.runs where id = p_run_id for no key update;
    line := convert_to(format(E'[openweights] this log of %s bytes was removed\n', bytes), 'UTF8');
    delete from public.log_chunks where run_id = p_run_id;
    insert into public.log_chunks values (p_run_id, 0, line);
    update public.runs set log_bytes = length(line) where id = p_run_id;
end $$;

-- Null days: nothing is removed by itself.
create or replace function public.set_retention(p_log_limit_mb integer, p_keep_days double precision)
returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
begin
    if p_log_limit_mb is null then
        perform refuse('invalid_input', 'log_limit_mb is missing');
    end if;
    perform check_number(p_log_limit_mb, 1, 1024, 'log_limit_mb');
    perform check_number(p_keep_days::numeric, 1, 36500, 'keep_days');
    update organizations set log_limit_mb = p_log_limit_mb, keep_days = p_keep_days
    where id = me.organization_id;
    return 'true';
end $$;

create or replace function public.store_sizes() returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member');
begin
    return jsonb_build_object(
        'file_bytes', (select coalesce(sum(bytes), 0) from files where organization_id = me.organization_id),
        'log_bytes', (select coalesce(sum(log_bytes), 0) from runs where organization_id = me.organization_id),
        'database_bytes', pg_database_size(current_database()));
end $$;
