-- Write down who did what, in the transaction that does it. Details hold no secret: names and numbers.
create or replace function openweights.note(
    me public.api_keys, p_action text, p_target text, p_details jsonb default '{}'
) returns void language sql as $$
    insert into public.audit (organization_id, who, key_id, key_name, action, target, details)
    select me.organization_id, m.email, me.id, me.name, p_action, p_target,
        jsonb_strip_nulls(p_details)
    from public.members m where m.id = me.member_id
$$;
