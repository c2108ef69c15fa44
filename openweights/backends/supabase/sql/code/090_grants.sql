-- What the roles of clients may touch at all. A project may have default privileges that give them
-- everything in `public`, so all is taken away first, and then given one by one.

revoke all on public.organizations, public.members, public.api_keys, public.secrets, public.files,
    public.file_keys, public.workers, public.jobs, public.job_files, public.runs, public.events,
    public.run_values, public.log_chunks, public.audit
    from public, anon, authenticated;
revoke all on all tables in schema openweights from public, anon, authenticated;

grant select on public.organizations, public.files, public.workers, public.jobs, public.runs,
    public.events, public.audit
    to anon, authenticated;

do $$
declare
    f regprocedure;
begin
    -- What asks who calls is one of ours.
    for f in select oid::regprocedure from pg_proc
        where pronamespace = 'openweights'::regnamespace
            or (pronamespace = 'public'::regnamespace and prosrc like '%openweights.caller(%')
    loop
        execute format('revoke all on function %s from public, anon, authenticated', f);
    end loop;
end $$;

-- for the policies
grant usage on schema openweights to anon, authenticated;
grant execute on function openweights.organization to anon, authenticated;
grant execute on function openweights.organization_or_null to anon, authenticated;
grant execute on function openweights.is_person to anon, authenticated;
grant execute on function openweights.worker to anon, authenticated;
grant execute on function openweights.worker_jobs to anon, authenticated;
grant execute on function openweights.worker_files to anon, authenticated;
grant execute on function openweights.has_record to anon, authenticated;
grant execute on function openweights.key_id to anon, authenticated;
grant execute on function openweights.is_own_place to anon, authenticated;

-- jobs
grant execute on function public.submit_job to anon, authenticated;
grant execute on function public.cancel_job to anon, authenticated;
grant execute on function public.restart_job to anon, authenticated;
grant execute on function public.set_timeout to anon, authenticated;
grant execute on function public.place_in_queue to anon, authenticated;
grant execute on function public.queue_state to anon, authenticated;
grant execute on function public.set_paused to anon, authenticated;
grant execute on function public.set_max_duration to anon, authenticated;

-- runs
grant execute on function public.start_script_run to anon, authenticated;
grant execute on function public.finish_run to anon, authenticated;
grant execute on function public.release_run to anon, authenticated;
grant execute on function public.touch_run to anon, authenticated;
grant execute on function public.append_events to anon, authenticated;
grant execute on function public.latest_values to anon, authenticated;
grant execute on function public.append_log to anon, authenticated;
grant execute on function public.read_log to anon, authenticated;

-- workers
grant execute on function public.register_worker to anon, authenticated;
grant execute on function public.set_worker_status to anon, authenticated;
grant execute on function public.claim_job to anon, authenticated;
grant execute on function public.heartbeat to anon, authenticated;
grant execute on function public.create_worker to anon, authenticated;
grant execute on function public.set_worker_pod to anon, authenticated;
grant execute on function public.end_worker_pod to anon, authenticated;
grant execute on function public.pending_jobs to anon, authenticated;
grant execute on function public.manager_state to anon, authenticated;
grant execute on function public.market to anon, authenticated;
grant execute on function public.set_manager_state to anon, authenticated;

-- files
grant execute on function public.find_file to anon, authenticated;
grant execute on function public.put_file_record to anon, authenticated;
grant execute on function public.delete_file_record to anon, authenticated;

-- what is kept
grant execute on function public.delete_job to anon, authenticated;
grant execute on function public.collect_garbage to anon, authenticated;
grant execute on function public.store_sizes to anon, authenticated;
grant execute on function public.set_retention to anon, authenticated;

-- organization, members, keys
grant execute on function public.whoami to anon, authenticated;
grant execute on function public.rename_organization to anon, authenticated;
grant execute on function public.list_members to anon, authenticated;
grant execute on function public.add_member to anon, authenticated;
grant execute on function public.remove_member to anon, authenticated;
grant execute on function public.create_key to anon, authenticated;
grant execute on function public.list_keys to anon, authenticated;
grant execute on function public.revoke_key to anon, authenticated;

-- secrets
grant execute on function public.set_secrets_key to anon, authenticated;
grant execute on function public.secrets_key to anon, authenticated;
grant execute on function public.set_secret to anon, authenticated;
grant execute on function public.delete_secret to anon, authenticated;
grant execute on function public.list_secrets to anon, authenticated;
grant execute on function public.job_secrets to anon, authenticated;

-- costs
grant execute on function public.cost_report to anon, authenticated;
grant execute on function public.set_budget to anon, authenticated;

notify pgrst, 'reload schema';
