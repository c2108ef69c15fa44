-- Records of files. Their content is an object of the bucket `files`, put there before the record.

create or replace function openweights.file_json(f public.files) returns jsonb
language sql stable as $$
    select jsonb_build_object('id', f.id, 'purpose', f.purpose, 'filename', f.filename,
        'bytes', f.bytes, 'created_at', f.created_at)
$$;

-- Where a file's content lies, and its digest, for whoever may read it; null when there is no such
-- file. `is_settled` is false of what only a worker's key has put: a person puts it anew.
create or replace function public.find_file(p_id text) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member', 'worker');
begin
    if me.role = 'worker' and not p_id = any (worker_files()) then
        return null;
    end if;
    return (
        select jsonb_build_object('object', coalesce(f.object, f.id), 'sha256', f.sha256,
            'is_settled', me.role = 'worker' or k.role <> 'worker')
        from files f join api_keys k on k.id = f.created_by_key
        where f.organization_id = me.organization_id and f.id = p_id
    );
end $$;

-- The record of content that the bucket has, new or as it was. Content is put into a folder of the
-- key that puts it, where nobody else writes. The digest is that of which the id holds the first 12
-- digits: who gives it has had the content in hand, and may read it from then on. The database cannot
-- compare it with the content, so what a worker's key has recorded gives way to a person's upload.
create or replace function public.put_file_record(
    p_id text, p_purpose text, p_filename text, p_bytes bigint, p_sha256 text
) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member', 'worker');
    is_name boolean := check_filename(p_filename);
    place text := me.id || '/' || p_id;
    f files;
    is_there boolean;
begin
    if p_purpose !~ '^[A-Za-z0-9_-]{1,64}$' or p_sha256 !~ '^[0-9a-f]{64}$' or p_bytes < 0
        or p_id is distinct from p_purpose || ':file-' || left(p_sha256, 12)
    then
        perform refuse('invalid_input', format(
            '%L is not the id of a file with purpose %L and digest %L', p_id, p_purpose, p_sha256));
    end if;
    if not has_object(me.organization_id, place) then
        -- Clients of before put it under its id.
        place := case when me.role <> 'worker' and has_object(me.organization_id, p_id) then p_id end;
    end if;
    select * into f from files where organization_id = me.organization_id and id = p_id for update;
    is_there := found and has_object(me.organization_id, coalesce(f.object, f.id));
    if place is null and not (is_there and f.sha256 = p_sha256) then
        perform refuse('not_found', format('the bucket has no content of %s: upload it first', p_id));
    elsif f.id is null then
        insert into files (organization_id, id, purpose, filename, bytes, sha256, created_by_key, object)
        values (me.organization_id, p_id, p_purpose, p_filename, p_bytes, p_sha256, me.id, place)
        on conflict do nothing;
    elsif place is not null and ((not is_there and f.sha256 = p_sha256)
        or (me.role <> 'worker' and exists (
            select from api_keys where id = f.created_by_key and role = 'worker')))
    then
        update files set filename = p_filename, bytes = p_bytes, sha256 = p_sha256,
            created_by_key = me.id, object = place
        where organization_id = me.organization_id and id = p_id;
    end if;
    select * into f from files where organization_id = me.organization_id and id = p_id;
    if f.sha256 <> p_sha256 then
        perform refuse('invalid_input', format(
            'another content already has the id %s: change a byte of yours', p_id));
    end if;
    insert into file_keys values (me.organization_id, me.id, p_id) on conflict do nothing;
    -- Whoever puts it will name it: `collect_garbage` waits for that.
    update files set used_at = now() where organization_id = me.organization_id and id = p_id;
    return file_json(f);
end $$;

create or replace function openweights.has_object(p_organization uuid, p_place text) returns boolean
language sql stable as $$
    select exists (
        select from storage.objects
        where bucket_id = 'files' and name = p_organization || '/' || p_place
    )
$$;

-- A worker may delete the checkpoints of its jobs, unless another job names the same content.
create or replace function openweights.check_checkpoint(me public.api_keys, f public.files)
returns void language plpgsql as $$
begin
    if f.purpose <> 'checkpoint' or not exists (
        select from public.job_files jf join public.jobs j
            on j.organization_id = jf.organization_id and j.id = jf.job_id
            join public.runs r on r.organization_id = j.organization_id and r.job_id = j.id
                and r.attempt = j.attempts
        where jf.organization_id = me.organization_id and jf.file_id = f.id
        group by jf.file_id
        having bool_and(r.worker_id is not distinct from me.worker_id) and count(*) = 1
    ) then
        perform openweights.refuse('forbidden', format(
            '%s is no checkpoint of this worker''s job alone: its key may not delete it', f.id));
    end if;
end $$;

-- The record goes first and then the object, so that no record is left of nothing. Answers where the
-- object lies; false when there was no record.
create or replace function public.delete_file_record(p_id text) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member', 'worker');
    f files;
begin
    select * into f from files where organization_id = me.organization_id and id = p_id for update;
    if not found then
        return 'false';
    end if;
    if me.role = 'worker' then
        perform check_checkpoint(me, f);
        -- It will delete the object, for which it must see it.
        insert into file_keys values (me.organization_id, me.id, p_id) on conflict do nothing;
    end if;
    delete from files where organization_id = me.organization_id and id = p_id;
    return to_jsonb(coalesce(f.object, f.id));
end $$;
