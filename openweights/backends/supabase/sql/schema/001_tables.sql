-- The tables. Steps in this folder are applied once, in the order of their numbers, and are never
-- edited once released; what is in ../code is replaced as a whole each time.
--
-- Everything belongs to an organization, and its id stands in every row that a policy looks at, so
-- that no policy has to join. Only core PostgreSQL >= 15: no extension.

create schema openweights;  -- not exposed by PostgREST: what clients cannot call

create table openweights.steps (
    name text primary key,
    applied_at timestamptz not null default now()
);

-- The database as `ow db init` left it, for `ow db check` to compare with.
create table openweights.installed (
    kind text not null,
    name text not null,
    definition text not null,
    primary key (kind, name)
);

create table openweights.sources (
    name text primary key,
    sha256 text not null
);

-- ---- who

create table public.organizations (
    id uuid primary key default gen_random_uuid(),
    name text not null check (name <> ''),
    -- Secrets are sealed to this key; the one that opens them is not in the database.
    secrets_public_key text,
    heartbeat_s double precision not null default 10,
    lease_s double precision not null default 60,
    created_at timestamptz not null default now()
);

create table public.members (
    id uuid primary key default gen_random_uuid(),
    organization_id uuid not null references public.organizations,
    email text not null check (email <> ''),
    role text not null check (role in ('admin', 'member')),
    created_at timestamptz not null default now(),
    removed_at timestamptz
);
create unique index members_present on public.members (organization_id, lower(email))
    where removed_at is null;

create table public.api_keys (
    id uuid primary key default gen_random_uuid(),
    organization_id uuid not null references public.organizations,
    member_id uuid not null references public.members,
    name text not null,
    prefix text not null,                -- what is shown of it
    key_hash text not null unique,       -- sha256, hexadecimal: the key itself is nowhere
    role text not null check (role in ('admin', 'member', 'worker')),
    worker_id text check (worker_id is null or role = 'worker'),
    budget_usd numeric check (budget_usd >= 0),
    spent_usd numeric not null default 0,  -- by runs that have ended
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz
);
create index api_keys_listed on public.api_keys (organization_id, created_at);
create index api_keys_limited on public.api_keys (organization_id) where budget_usd is not null;

create table public.secrets (
    organization_id uuid not null references public.organizations,
    name text not null check (name ~ '^[A-Za-z_][A-Za-z0-9_]{0,199}$'),
    sealed text not null,
    updated_at timestamptz not null default now(),
    updated_by uuid not null references public.api_keys,
    primary key (organization_id, name)
);

-- ---- files; their content is in the bucket `files`

create table public.files (
    organization_id uuid not null references public.organizations,
    id text not null,
    seq bigint generated always as identity,
    purpose text not null,
    filename text not null,
    bytes bigint not null check (bytes >= 0),
    sha256 text not null,
    created_at timestamptz not null default now(),
    created_by_key uuid not null references public.api_keys,
    primary key (organization_id, id)
);
create index files_listed on public.files (organization_id, created_at desc, seq desc);
create index files_of_purpose on public.files (organization_id, purpose, created_at desc, seq desc);

-- Keys that have put a file: they have had its content in hand, so that they may read it.
create table public.file_keys (
    organization_id uuid not null,
    key_id uuid not null references public.api_keys,
    file_id text not null,
    primary key (organization_id, key_id, file_id)
);

-- ---- workers

create table public.workers (
    organization_id uuid not null references public.organizations,
    id text not null,
    seq bigint generated always as identity,
    docker_image text not null default '',
    hardware_type text not null default 'cpu',
    gpu_count integer not null default 0,
    vram_gb integer not null default 0,
    cloud_type text check (cloud_type in ('SECURE', 'COMMUNITY', 'ALL')),
    pod_id text,
    cached_models text[] not null default '{}',
    status text not null check (status in ('starting', 'active', 'shutdown', 'terminated')),
    created_at timestamptz not null default now(),
    pinged_at timestamptz not null default now(),
    -- What it costs; a worker that nobody pays for by the hour has no price.
    provider text,
    price_usd_per_hour numeric check (price_usd_per_hour >= 0),
    started_at timestamptz,
    ended_at timestamptz,
    primary key (organization_id, id)
);
create index workers_listed on public.workers (organization_id, status, created_at desc);

-- ---- jobs, runs, events

-- Domains, because PostgreSQL reads the text of every CHECK of a table again for each statement
-- that writes to it, which took an eighth of the time of a claim.
create domain openweights.job_id as text check (value <> '');
create domain openweights.job_type as text
    check (value in ('fine-tuning', 'inference', 'script', 'api', 'custom'));
create domain openweights.job_status as text
    check (value in ('pending', 'in_progress', 'completed', 'failed', 'canceled'));
create domain openweights.run_status as text
    check (value in ('in_progress', 'completed', 'failed', 'canceled'));
create domain openweights.run_end as text
    check (value in ('finish', 'release', 'lease', 'worker', 'client'));

create table public.jobs (
    organization_id uuid not null references public.organizations,
    id openweights.job_id not null,
    seq bigint generated always as identity,
    type openweights.job_type not null,
    script text not null,
    params jsonb not null,
    model text,
    docker_image text not null default '',
    requires_vram_gb integer not null default 0,
    allowed_hardware text[],
    bundle_file text,
    priority integer not null default 0,
    max_attempts integer not null default 3,
    timeout_at timestamptz,
    max_cost_usd numeric,
    status openweights.job_status not null,
    attempts integer not null default 0,
    lost_attempts integer not null default 0,  -- of the allowance of max_attempts
    outputs jsonb,
    worker_id text,
    submitted_by_key uuid not null references public.api_keys,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    primary key (organization_id, id)
);
-- Holds only what waits, so that the cost of a claim does not grow with the history.
create index jobs_pending on public.jobs (organization_id, priority desc, created_at, seq)
    where status = 'pending';
-- A claim passes the entries that earlier claims have left in it, until they are swept out.
alter table public.jobs set (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 500);
create index jobs_listed on public.jobs (organization_id, updated_at desc, seq desc);
create index jobs_of_status on public.jobs (organization_id, status, updated_at desc, seq desc);

-- The life cycle of a job, for whatever writes to the table. (Not as the condition of the trigger:
-- like a CHECK, it would be read from its text each time.)
create function openweights.check_transition() returns trigger language plpgsql as $$
begin
    if new.status = old.status
        or (old.status = 'pending' and new.status in ('in_progress', 'canceled'))
        or (old.status = 'in_progress' and new.status <> 'in_progress')
        or (old.status in ('failed', 'canceled') and new.status = 'pending')
    then
        return new;
    end if;
    raise exception 'the life cycle of a job forbids the change from % to %', old.status, new.status
        using errcode = 'check_violation';
end $$;

create trigger jobs_transition before update of status on public.jobs for each row
execute function openweights.check_transition();

-- The files that a job names: what the worker that holds it may read.
create table public.job_files (
    organization_id uuid not null,
    job_id text not null,
    file_id text not null,
    primary key (organization_id, job_id, file_id)
);

create table public.runs (
    id bigint generated always as identity primary key,
    organization_id uuid not null,
    job_id text not null,
    worker_id text,
    attempt integer not null,
    status openweights.run_status not null,
    ended_by openweights.run_end,
    error text,
    log_bytes bigint not null default 0,
    lease_expires_at timestamptz,
    created_at timestamptz not null default now(),
    ended_at timestamptz,
    -- Taken over from worker and job when it began: what it costs, and whom. (No reference: it would
    -- have all workers of an organization lock the same key.)
    price_usd_per_hour numeric,
    charged_key uuid,
    foreign key (organization_id, job_id) references public.jobs,
    unique (organization_id, job_id, attempt)
);
create unique index runs_of_job on public.runs (organization_id, job_id)
    where status = 'in_progress';
create unique index runs_held on public.runs (organization_id, worker_id)
    where status = 'in_progress';
create index runs_leased on public.runs (organization_id, lease_expires_at)
    where status = 'in_progress';
create index runs_of_worker on public.runs (organization_id, worker_id, id);
create index runs_charged on public.runs (charged_key)
    where status = 'in_progress' and price_usd_per_hour > 0;

create table public.events (
    id bigint generated always as identity primary key,
    organization_id uuid not null,
    job_id text not null,
    run_id bigint not null references public.runs,
    key text not null,
    data jsonb not null check (jsonb_typeof(data) = 'object'),
    created_at timestamptz not null,
    unique (run_id, key)
);
create index events_of_run on public.events (run_id, id);
create index events_of_job on public.events (organization_id, job_id, id);

-- The last value of each key over the events of a run, kept up to date as they come, so that
-- neither the end of a run nor a look at it reads all of them.
create table public.run_values (
    run_id bigint primary key references public.runs,
    data jsonb not null
);

create table public.log_chunks (
    run_id bigint not null references public.runs,
    first_byte bigint not null,
    data bytea not null,
    primary key (run_id, first_byte)
);
