-- A store as version 1.0.0 made it: SQLite's dump. See ../test_upgrade.py.
BEGIN TRANSACTION;
CREATE TABLE events (
        id INTEGER PRIMARY KEY,
        run_id INTEGER NOT NULL REFERENCES runs (id),
        key TEXT NOT NULL,
        data TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        UNIQUE (run_id, key)
    );
INSERT INTO "events" VALUES(1,2,'k1','{"step":4,"loss":0.5}',1767323045687901);
INSERT INTO "events" VALUES(2,2,'k2','{"type":"checkpoint","step":4,"file":"checkpoint:file-fe703522f8b1"}',1767323045688901);
CREATE TABLE files (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        purpose TEXT NOT NULL,
        filename TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        sha256 TEXT NOT NULL,
        created_at INTEGER NOT NULL
    );
INSERT INTO "files" VALUES(1,'conversations:file-444caa5e4d40','conversations','train.jsonl',18,'444caa5e4d40f87eadb0633461c7817c100a48e84914abf3e3a57a388eece2b6',1767323045679901);
INSERT INTO "files" VALUES(2,'checkpoint:file-fe703522f8b1','checkpoint','checkpoint-4.zip',20,'fe703522f8b13b8f7c5ae33a27b4e639f033e85358322af31ea8bd259d8ca0df',1767323045680901);
CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        type TEXT NOT NULL,
        script TEXT NOT NULL,
        params TEXT NOT NULL,
        model TEXT,
        docker_image TEXT NOT NULL,
        requires_vram_gb INTEGER NOT NULL,
        allowed_hardware TEXT,
        bundle_file TEXT,
        priority INTEGER NOT NULL,
        max_attempts INTEGER NOT NULL,
        timeout_at INTEGER,
        status TEXT NOT NULL
            CHECK (status IN ('pending', 'in_progress', 'completed', 'failed', 'canceled')),
        attempts INTEGER NOT NULL DEFAULT 0,
        lost_runs INTEGER NOT NULL DEFAULT 0,
        outputs TEXT,
        worker_id TEXT,
        created_at INTEGER NOT NULL,
        updated_at INTEGER NOT NULL
    );
INSERT INTO "jobs" VALUES(1,'failed','custom','true','{"validated_params":{"x":1},"mounted_files":{"data.jsonl":"conversations:file-444caa5e4d40"},"cloud_type":"SECURE"}',NULL,'',0,NULL,NULL,0,3,NULL,'failed',1,0,'{}',NULL,1767323045682901,1767323045684901);
INSERT INTO "jobs" VALUES(2,'running','custom','true','{"validated_params":{"x":1},"mounted_files":{"data.jsonl":"conversations:file-444caa5e4d40"},"cloud_type":"SECURE"}',NULL,'',0,NULL,NULL,0,3,NULL,'in_progress',1,0,NULL,'w-old',1767323045685901,1767323045686901);
INSERT INTO "jobs" VALUES(3,'waiting','custom','true','{"validated_params":{"x":1},"mounted_files":{"data.jsonl":"conversations:file-444caa5e4d40"},"cloud_type":"SECURE"}',NULL,'',80,'["1x H100S"]',NULL,-1,3,NULL,'pending',0,0,NULL,NULL,1767323045689901,1767323045689901);
INSERT INTO "jobs" VALUES(4,'canceled','custom','true','{"validated_params":{"x":1},"mounted_files":{"data.jsonl":"conversations:file-444caa5e4d40"},"cloud_type":"SECURE"}',NULL,'',0,NULL,NULL,0,3,NULL,'canceled',0,0,NULL,NULL,1767323045690901,1767323045691901);
INSERT INTO "jobs" VALUES(5,'script','script','python x.py','{}',NULL,'',0,NULL,NULL,0,3,NULL,'in_progress',1,0,NULL,NULL,1767323045692901,1767323045692901);
CREATE TABLE runs (
        id INTEGER PRIMARY KEY,
        job_id TEXT NOT NULL REFERENCES jobs (id),
        worker_id TEXT,
        attempt INTEGER NOT NULL,
        status TEXT NOT NULL
            CHECK (status IN ('in_progress', 'completed', 'failed', 'canceled')),
        ended_by TEXT CHECK (ended_by IN ('finish', 'release', 'lease', 'worker', 'client')),
        error TEXT,
        lease_expires_at INTEGER,
        created_at INTEGER NOT NULL,
        ended_at INTEGER,
        UNIQUE (job_id, attempt)
    );
INSERT INTO "runs" VALUES(1,'failed','w-old',1,'failed','finish','exit code 3: boom',NULL,1767323045683901,1767323045684901);
INSERT INTO "runs" VALUES(2,'running','w-old',1,'in_progress',NULL,NULL,1767323105686901,1767323045686901,NULL);
INSERT INTO "runs" VALUES(3,'script',NULL,1,'in_progress',NULL,NULL,NULL,1767323045692901,NULL);
CREATE TABLE workers (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        docker_image TEXT NOT NULL,
        hardware_type TEXT NOT NULL,
        gpu_count INTEGER NOT NULL,
        vram_gb INTEGER NOT NULL,
        cloud_type TEXT,
        pod_id TEXT,
        cached_models TEXT NOT NULL,
        status TEXT NOT NULL
            CHECK (status IN ('starting', 'active', 'shutdown', 'terminated')),
        incarnation TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        pinged_at INTEGER NOT NULL
    );
INSERT INTO "workers" VALUES(1,'w-old','','cpu',0,0,NULL,NULL,'[]','active','04aed16fdfae2d0e',1767323045681901,1767323045681901);
CREATE INDEX jobs_pending ON jobs (priority DESC, created_at) WHERE status = 'pending';
CREATE INDEX jobs_listed ON jobs (status, updated_at);
CREATE TRIGGER jobs_transition BEFORE UPDATE OF status ON jobs
    WHEN NOT (
        new.status = old.status
        OR (old.status = 'pending' AND new.status IN ('in_progress', 'canceled'))
        OR (old.status = 'in_progress' AND new.status != 'in_progress')
        OR (old.status IN ('failed', 'canceled') AND new.status = 'pending')
    )
    BEGIN
        SELECT RAISE(ABORT, 'the life cycle of a job forbids this change of its status');
    END;
CREATE UNIQUE INDEX runs_of_job ON runs (job_id) WHERE status = 'in_progress';
CREATE UNIQUE INDEX runs_of_worker ON runs (worker_id) WHERE status = 'in_progress';
CREATE INDEX runs_leased ON runs (lease_expires_at) WHERE status = 'in_progress';
CREATE INDEX events_of_run ON events (run_id, id);
CREATE INDEX files_listed ON files (purpose, created_at);
CREATE INDEX workers_silent ON workers (pinged_at) WHERE status != 'terminated';
CREATE INDEX events_of_type ON events (run_id, json_extract(data, '$.type'), id)
    WHERE json_extract(data, '$.type') IS NOT NULL
    ;
COMMIT;
PRAGMA user_version = 2;
