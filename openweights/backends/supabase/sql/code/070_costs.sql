-- What was spent. A run costs its time at its worker's price; a worker costs from the start of its
-- pod to its end. What remains of that (boot, idleness, shutdown) is overhead: equal shares of it are
-- those of the jobs that ran there, and of a worker on which nothing ran nobody's. A price that is not
-- known is not 0: those workers are counted beside. Budgets count the time of runs alone.

create or replace function openweights.worker_cost(w public.workers) returns numeric
language sql stable as $$
    select coalesce(w.price_usd_per_hour
        * extract(epoch from coalesce(w.ended_at, now()) - w.started_at)::numeric / 3600, 0)
$$;

-- Each job's share of what pods have cost. A lost run may be ended long after its pod: overhead is
-- never less than nothing.
create or replace function openweights.job_costs(p_organization uuid)
returns table (job_id text, runs bigint, direct_usd numeric, overhead_usd numeric)
language sql stable as $$
    with stints as (
        select r.worker_id, r.job_id, sum(openweights.run_cost(r)) as usd, count(*) as runs
        from public.runs r
        where r.organization_id = p_organization and r.price_usd_per_hour > 0
        group by r.worker_id, r.job_id
    ), shares as (
        select s.worker_id, greatest(max(openweights.worker_cost(w)) - sum(s.usd), 0) / count(*) as usd
        from stints s join public.workers w
            on w.organization_id = p_organization and w.id = s.worker_id
        group by s.worker_id
    )
    select s.job_id, sum(s.runs)::bigint, sum(s.usd), coalesce(sum(h.usd), 0)
    from stints s left join shares h on h.worker_id = s.worker_id
    group by s.job_id
$$;

create or replace function openweights.job_cost_lines(
    p_organization uuid, p_limit integer, p_offset integer
) returns jsonb language sql stable as $$
    select coalesce(jsonb_agg(to_jsonb(page) order by page.usd desc, page.job_id), '[]')
    from (
        select c.*, c.direct_usd + c.overhead_usd as usd
        from openweights.job_costs(p_organization) c
        order by usd desc, c.job_id limit p_limit offset p_offset
    ) as page
$$;

create or replace function openweights.member_cost_lines(p_organization uuid)
returns jsonb language sql stable as $$
    select coalesce(jsonb_agg(to_jsonb(line) order by line.usd desc, line.email), '[]')
    from (
        select m.email, count(*) as jobs, sum(c.direct_usd + c.overhead_usd) as usd
        from openweights.job_costs(p_organization) c
        join public.jobs j on j.organization_id = p_organization and j.id = c.job_id
        join public.api_keys k on k.id = j.submitted_by_key
        join public.members m on m.id = k.member_id
        group by m.email
    ) as line
$$;

create or replace function public.cost_report(p_limit integer default 100, p_offset integer default 0)
returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin', 'member');
    total numeric;
    direct numeric;
begin
    select coalesce(sum(worker_cost(w)), 0) into total
    from workers w where w.organization_id = me.organization_id;
    select coalesce(sum(run_cost(r)), 0) into direct
    from runs r where r.organization_id = me.organization_id and r.price_usd_per_hour > 0;
    return jsonb_build_object(
        'currency', 'USD', 'as_of', now(), 'total_usd', total, 'direct_usd', direct,
        'overhead_usd', total - direct,
        'unpriced_workers', (
            select count(*) from workers where organization_id = me.organization_id
                and provider is not null and started_at is not null and price_usd_per_hour is null),
        'jobs', job_cost_lines(me.organization_id, p_limit, p_offset),
        'members', member_cost_lines(me.organization_id),
        'workers', (
            select coalesce(jsonb_agg(jsonb_build_object('id', w.id, 'provider', w.provider,
                'price_usd_per_hour', w.price_usd_per_hour, 'started_at', w.started_at,
                'ended_at', w.ended_at, 'usd', worker_cost(w)) order by w.seq desc), '[]')
            from (select * from workers where organization_id = me.organization_id
                and provider is not null order by seq desc limit p_limit offset p_offset) w),
        'keys', (
            select coalesce(jsonb_agg(jsonb_build_object('id', k.id, 'name', k.name, 'email', m.email,
                'spent_usd', spent(k), 'budget_usd', k.budget_usd) order by k.created_at, k.id), '[]')
            from api_keys k join members m on m.id = k.member_id
            where k.organization_id = me.organization_id and k.role <> 'worker'));
end $$;

-- What a key may spend in its life; null for no limit.
create or replace function public.set_budget(p_key_id uuid, p_usd numeric) returns jsonb
language plpgsql security definer set search_path = openweights, public, pg_temp as $$
declare
    me api_keys := openweights.caller('admin');
    k api_keys;
begin
    if p_usd < 0 then
        perform refuse('invalid_input', 'a budget is at least 0 USD');
    end if;
    perform check_number(p_usd, 0, 1000000000, 'budget_usd');
    update api_keys set budget_usd = p_usd
    where organization_id = me.organization_id and id = p_key_id
    returning * into k;
    if not found then
        perform refuse('not_found', format('no key %s in this organization', p_key_id));
    end if;
    perform note(me, 'key.budget', k.name, jsonb_build_object('key_id', k.id, 'usd', p_usd));
    return key_json(k);
end $$;
