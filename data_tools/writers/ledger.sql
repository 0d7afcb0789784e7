-- Each is asked once, by whichever job. key: Request.key
CREATE TABLE answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, text TEXT NOT NULL, finish TEXT NOT NULL,
    refusal TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, dollars REAL NOT NULL,
    prompt_at_most INTEGER NOT NULL, completion_at_most INTEGER NOT NULL, at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE averages (
    model TEXT PRIMARY KEY, answers INTEGER NOT NULL, prompt_share REAL NOT NULL,
    completion_share REAL NOT NULL
) WITHOUT ROWID;
-- Written before a request is sent, with the most that it can cost.
CREATE TABLE under_way (
    key TEXT PRIMARY KEY, run TEXT NOT NULL, job TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, dollars REAL NOT NULL
) WITHOUT ROWID;
-- Over all runs. lost: of requests whose answer never came.
CREATE TABLE spent (
    job TEXT NOT NULL, lost INTEGER NOT NULL, requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, dollars REAL NOT NULL,
    PRIMARY KEY (job, lost)
) WITHOUT ROWID;
-- What a server was found not to understand.
CREATE TABLE servers (
    address TEXT NOT NULL, model TEXT NOT NULL, traits TEXT NOT NULL, PRIMARY KEY (address, model)
) WITHOUT ROWID;
-- Batches of the Batch API and the requests in them, written before anything of them leaves this machine.
CREATE TABLE shards (
    id TEXT PRIMARY KEY, run TEXT NOT NULL, job TEXT NOT NULL, address TEXT NOT NULL, state TEXT NOT NULL,
    file_id TEXT, batch_id TEXT, at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE shard_keys (
    key TEXT PRIMARY KEY, shard TEXT NOT NULL, prompt_at_most INTEGER NOT NULL,
    completion_at_most INTEGER NOT NULL, dollars REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX keys_of_shard ON shard_keys (shard)
