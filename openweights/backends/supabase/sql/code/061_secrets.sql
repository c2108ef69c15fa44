-- Secrets. What is stored is sealed to the organization's public key; the key that opens it is not
-- in the database, and a sealed value leaves only for a job that names it.

create or replace function public.set_secrets_key(p_public_key text) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
begin
    if coalesce(p_public_key, '') = '' then
        perform refuse('invalid_input', 'a public key is needed');
    end if;
    update organizations set secrets_public_key = p_public_key
    where id = me.organization_id
        and (secrets_public_key is not distinct from p_public_key
            or not exists (select from secrets where organization_id = me.organization_id));
    if not found then
        perform refuse('invalid_state', 'there are secrets that only the present key opens: delete them first');
    end if;
    perform note(me, 'secrets.key', null);
    return to_jsonb(p_public_key);
end $$;

create or replace function public.secrets_key() returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member');
begin
    return (select to_jsonb(secrets_public_key) from organizations where id = me.organization_id);
end $$;

create or replace function public.set_secret(p_name text, p_sealed text) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member');
begin
    if p_name is null or p_name !~ '^[A-Za-z_][A-Za-z0-9_]{0,199}$' then
        perform refuse('invalid_input', format('%L cannot name a secret: use letters, digits and _', p_name));
    elsif coalesce(p_sealed, '') = '' then
        perform refuse('invalid_input', 'a secret needs a value');
    end if;
    perform check_text(p_sealed, 200000, 'a secret');
    insert into secrets (organization_id, name, sealed, updated_by)
    values (me.organization_id, p_name, p_sealed, me.id)
    on conflict (organization_id, name) do update
        set sealed = excluded.sealed, updated_at = now(), updated_by = excluded.updated_by;
    perform note(me, 'secret.set', p_name);
    return to_jsonb(p_name);
end $$;

create or replace function public.delete_secret(p_name text) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member');
    was_there boolean;
begin
    delete from secrets where organization_id = me.organization_id and name = p_name;
    was_there := found;
    if was_there then
        perform note(me, 'secret.delete', p_name);
    end if;
    return to_jsonb(was_there);
end $$;

-- Names and moments, never values.
create or replace function public.list_secrets() returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member');
begin
    return coalesce((
        select jsonb_agg(jsonb_build_object('name', name, 'updated_at', updated_at) order by name)
        from secrets where organization_id = me.organization_id
    ), '[]');
end $$;

-- The sealed values of the names in the job's `params.secrets`, for the worker that holds its run.
create or replace function public.job_secrets(p_run_id bigint) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'worker');
    r runs := find_run(me.organization_id, p_run_id);
    is_allowed boolean := check_reporter(me, r);
    wanted jsonb;
begin
    select params -> 'secrets' into wanted from jobs
    where organization_id = me.organization_id and id = r.job_id and attempts = r.attempt
        and status = 'in_progress';
    if not found or r.status <> 'in_progress' or r.worker_id is null then
        perform refuse('forbidden', format('no worker holds run %s: its secrets are not given out', r.id));
    end if;
    return coalesce((
        select jsonb_object_agg(name, sealed)
        from secrets where organization_id = me.organization_id and wanted ? name
    ), '{}');
end $$;
