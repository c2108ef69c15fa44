-- Who did what: a row for each change that a person asked for, or the manager for one. Nobody changes
-- or deletes one.
create table public.audit (
    id bigint generated always as identity primary key,
    organization_id uuid not null references public.organizations,
    created_at timestamptz not null default now(),
    who text not null,  -- the e-mail address of the member
    key_id uuid not null,
    key_name text not null,
    action text not null,
    target text,
    details jsonb not null default '{}'
);
create index audit_listed on public.audit (organization_id, id desc);
create index audit_of_target on public.audit (organization_id, target, id desc);
