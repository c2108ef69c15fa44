-- The organization, its members, and their keys.

create or replace function public.whoami() returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member', 'worker');
begin
    return (
        select jsonb_build_object(
            'organization_id', o.id, 'organization', o.name, 'role', me.role, 'key_id', me.id,
            'key_name', me.name, 'email', m.email, 'worker_id', me.worker_id,
            'expires_at', me.expires_at, 'now', now(), 'heartbeat_s', o.heartbeat_s, 'lease_s', o.lease_s,
            'log_limit_mb', o.log_limit_mb, 'keep_days', o.keep_days,
            -- Which version of these files is installed: see `source_digest` in apply.py.
            'sources', (select encode(sha256(convert_to(
                string_agg(name || ' ' || sha256, E'\n' order by name collate "C"), 'UTF8')), 'hex')
                from openweights.sources))
        from organizations o, members m
        where o.id = me.organization_id and m.id = me.member_id
    );
end $$;

create or replace function public.rename_organization(p_name text) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
begin
    if coalesce(trim(p_name), '') = '' then
        perform refuse('invalid_input', 'an organization needs a name');
    end if;
    perform check_name(p_name, 200, 'name');
    update organizations set name = trim(p_name) where id = me.organization_id;
    perform note(me, 'organization.rename', trim(p_name));
    return jsonb_build_object('id', me.organization_id, 'name', trim(p_name));
end $$;

-- ---- members

create or replace function openweights.member_json(m public.members) returns jsonb
language sql stable as $$
    select to_jsonb(m) - '{organization_id}'::text[]
$$;

create or replace function public.list_members() returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member');
begin
    return coalesce((
        select jsonb_agg(member_json(m) order by m.created_at, m.email)
        from members m where m.organization_id = me.organization_id and m.removed_at is null
    ), '[]');
end $$;

-- Who is a member already gets the new role.
create or replace function public.add_member(p_email text, p_role text) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
    m members;
begin
    if p_email is null or p_email !~ '^[^@\s]+@[^@\s]+$' then
        perform refuse('invalid_input', format('%L is no e-mail address', p_email));
    elsif p_role is null or p_role not in ('admin', 'member') then
        perform refuse('invalid_input', format('%L is no role of a member: admin or member', p_role));
    end if;
    perform check_name(p_email, 300, 'email');
    insert into members (organization_id, email, role)
    values (me.organization_id, p_email, p_role)
    on conflict (organization_id, lower(email)) where removed_at is null
        do update set role = excluded.role
    returning * into m;
    if m.role = 'member' then
        perform check_admin_is_left(me.organization_id);
        -- A key may do no more than its member.
        update api_keys set role = 'member' where member_id = m.id and role = 'admin';
    end if;
    perform note(me, 'member.add', m.email, jsonb_build_object('role', m.role));
    return member_json(m);
end $$;

-- Raises if the change so far would leave the organization without an admin.
create or replace function openweights.check_admin_is_left(p_organization uuid) returns void
language plpgsql as $$
begin
    -- Two admins who remove each other at the same moment take turns here.
    perform from public.organizations where id = p_organization for update;
    if not exists (
        select from public.members
        where organization_id = p_organization and role = 'admin' and removed_at is null
    ) then
        perform openweights.refuse('invalid_state', 'an organization needs an admin: make another member one first');
    end if;
end $$;

-- All keys of the member are dead from then on.
create or replace function public.remove_member(p_member_id uuid) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
    m members;
begin
    perform from organizations where id = me.organization_id for update;
    update members set removed_at = now()
    where organization_id = me.organization_id and id = p_member_id and removed_at is null
    returning * into m;
    if not found then
        perform refuse('not_found', format('no member %s in this organization', p_member_id));
    end if;
    perform check_admin_is_left(me.organization_id);
    perform note(me, 'member.remove', m.email);
    return member_json(m);
end $$;

-- ---- keys

create or replace function openweights.key_json(k public.api_keys) returns jsonb
language sql stable as $$
    select to_jsonb(k) - '{organization_id,key_hash}'::text[]
        || jsonb_build_object('email', (select email from public.members where id = k.member_id))
$$;

-- `ow_` and 48 hexadecimal digits of 244 random bits.
create or replace function openweights.new_key() returns text
language sql volatile as $$
    select 'ow_' || left(encode(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'hex'), 48)
$$;

-- The key itself is in the answer, and nowhere else.
create or replace function openweights.insert_key(
    m public.members, p_name text, p_role text, p_expires_at timestamptz, p_worker_id text,
    p_budget_usd numeric
) returns jsonb language plpgsql as $$
declare
    key text := openweights.new_key();
    k public.api_keys;
begin
    insert into public.api_keys (organization_id, member_id, name, prefix, key_hash, role,
        worker_id, expires_at, budget_usd)
    values (m.organization_id, m.id, coalesce(p_name, ''), left(key, 11), openweights.hash(key),
        p_role, p_worker_id, p_expires_at, p_budget_usd)
    returning * into k;
    return openweights.key_json(k) || jsonb_build_object('key', key);
end $$;

create or replace function public.create_key(
    p_name text, p_role text, p_expires_at timestamptz default null, p_worker_id text default null,
    p_budget_usd numeric default null, p_member_id uuid default null
) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
    m members;
    made jsonb;
begin
    select * into m from members
    where id = coalesce(p_member_id, me.member_id) and organization_id = me.organization_id
        and removed_at is null;
    if not found then
        perform refuse('not_found', format('no member %s in this organization', p_member_id));
    elsif p_role is null or p_role not in ('admin', 'member', 'worker') then
        perform refuse('invalid_input', format('%L is no role of a key: admin, member or worker', p_role));
    elsif p_role = 'admin' and m.role <> 'admin' then
        perform refuse('invalid_input', format('%s is no admin, so a key of theirs cannot be one', m.email));
    elsif p_expires_at <= now() then
        perform refuse('invalid_input', 'a key must expire in the future');
    elsif p_worker_id is not null and p_role <> 'worker' then
        perform refuse('invalid_input', 'only a key of role worker belongs to a worker');
    elsif p_budget_usd < 0 then
        perform refuse('invalid_input', 'a budget is at least 0 USD');
    end if;
    perform check_name(p_name, 200, 'name') and check_moment(p_expires_at, 'expires_at')
        and check_number(p_budget_usd, 0, 1000000000, 'budget_usd');
    made := insert_key(m, p_name, p_role, p_expires_at, p_worker_id, p_budget_usd);
    perform note(me, 'key.create', made ->> 'name', jsonb_build_object('key_id', made -> 'id',
        'role', p_role, 'of', m.email, 'worker_id', p_worker_id, 'expires_at', p_expires_at));
    return made;
end $$;

create or replace function public.list_keys() returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
begin
    return coalesce((
        select jsonb_agg(key_json(k) order by k.created_at, k.id)
        from api_keys k where k.organization_id = me.organization_id
    ), '[]');
end $$;

-- From the next request on. Revoking again changes nothing.
create or replace function public.revoke_key(p_key_id uuid) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
    k api_keys;
begin
    update api_keys set revoked_at = coalesce(revoked_at, now())
    where organization_id = me.organization_id and id = p_key_id
    returning * into k;
    if not found then
        perform refuse('not_found', format('no key %s in this organization', p_key_id));
    end if;
    perform note(me, 'key.revoke', k.name, jsonb_build_object('key_id', k.id));
    return key_json(k);
end $$;

-- For the operator, over a direct connection: granted to nobody.
create or replace function openweights.create_organization(p_name text, p_email text) returns jsonb
language plpgsql as $$
declare
    m public.members;
    id uuid;
begin
    insert into public.organizations (name) values (p_name) returning organizations.id into id;
    insert into public.members (organization_id, email, role) values (id, p_email, 'admin')
    returning * into m;
    return jsonb_build_object('organization_id', id)
        || openweights.insert_key(m, 'first', 'admin', null, null, null);
end $$;
