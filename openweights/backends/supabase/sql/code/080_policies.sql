-- Who may read which rows. Nobody writes to a table: that is what the functions are for. A table
-- without a policy is read by nobody either: keys, members, secrets, logs.
--
-- Each function is in a subselect, so that it is asked once per statement and not for every row.

do $$
declare
    t text;
begin
    foreach t in array array['organizations', 'members', 'api_keys', 'secrets', 'files', 'file_keys',
        'workers', 'jobs', 'job_files', 'runs', 'events', 'run_values', 'log_chunks', 'audit']
    loop
        execute format('alter table public.%I enable row level security', t);
    end loop;
end $$;

drop policy if exists own_organization on public.organizations;
create policy own_organization on public.organizations for select to anon, authenticated
    using (id = (select openweights.organization()));

drop policy if exists people_or_itself on public.workers;
create policy people_or_itself on public.workers for select to anon, authenticated
    using (organization_id = (select openweights.organization())
        and ((select openweights.is_person()) or id = (select openweights.worker())));

drop policy if exists people on public.audit;
create policy people on public.audit for select to anon, authenticated
    using (organization_id = (select openweights.organization())
        and (select openweights.is_person()));

drop policy if exists people_or_its_worker on public.jobs;
create policy people_or_its_worker on public.jobs for select to anon, authenticated
    using (organization_id = (select openweights.organization())
        and ((select openweights.is_person())
            or id = any ((select openweights.worker_jobs())::text[])));

drop policy if exists people_or_its_worker on public.runs;
create policy people_or_its_worker on public.runs for select to anon, authenticated
    using (organization_id = (select openweights.organization())
        and ((select openweights.is_person())
            or job_id = any ((select openweights.worker_jobs())::text[])));

drop policy if exists people_or_its_worker on public.events;
create policy people_or_its_worker on public.events for select to anon, authenticated
    using (organization_id = (select openweights.organization())
        and ((select openweights.is_person())
            or job_id = any ((select openweights.worker_jobs())::text[])));

drop policy if exists people_or_its_worker on public.files;
create policy people_or_its_worker on public.files for select to anon, authenticated
    using (organization_id = (select openweights.organization())
        and ((select openweights.is_person())
            or id = any ((select openweights.worker_files())::text[])));

-- ---- the content of files: objects of one private bucket

insert into storage.buckets (id, name, public) values ('files', 'files', false)
on conflict (id) do update set public = false where buckets.public;

-- A worker sees the files of its job, and what it has put itself: an upload of somebody else's is
-- nobody's business before it has a record. (What has no record but had one, and that it may delete,
-- it sees by the file's id.)
drop policy if exists openweights_read on storage.objects;
create policy openweights_read on storage.objects for select to anon, authenticated
    using (bucket_id = 'files'
        and split_part(name, '/', 1) = (select openweights.organization_or_null())
        and ((select openweights.is_person())
            or split_part(name, '/', 2) = (select openweights.key_id())
            or regexp_replace(name, '^.*/', '') = any ((select openweights.worker_files())::text[])));

drop policy if exists openweights_write on storage.objects;
create policy openweights_write on storage.objects for insert to anon, authenticated
    with check (bucket_id = 'files' and openweights.is_own_place(name));

-- What has a record neither changes nor goes: its id is the digest of its content. An upload that
-- broke off may be done again, and a file is deleted record first.
drop policy if exists openweights_rewrite on storage.objects;
create policy openweights_rewrite on storage.objects for update to anon, authenticated
    using (bucket_id = 'files' and openweights.is_own_place(name) and not openweights.has_record(name))
    with check (bucket_id = 'files' and openweights.is_own_place(name)
        and not openweights.has_record(name));

drop policy if exists openweights_delete on storage.objects;
create policy openweights_delete on storage.objects for delete to anon, authenticated
    using (bucket_id = 'files'
        and split_part(name, '/', 1) = (select openweights.organization_or_null())
        and not openweights.has_record(name));
