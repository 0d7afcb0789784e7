-- Tables of a job's state, see store.py. A record has 4096 possible items.
-- The id of a forgotten row is never given again (AUTOINCREMENT): items would pass to another record.
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
-- depends: a hash of what its records depend on. A changed source is read again.
CREATE TABLE sources (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, place INTEGER NOT NULL,
    depends TEXT NOT NULL, arranged TEXT);
-- Committed with its records and drops.
CREATE TABLE units (
    id INTEGER PRIMARY KEY AUTOINCREMENT, source INTEGER NOT NULL, place INTEGER, key TEXT NOT NULL,
    fingerprint BLOB NOT NULL, files BLOB NOT NULL, samples INTEGER NOT NULL,
    regions INTEGER NOT NULL, UNIQUE (source, key));
-- As they were read.
CREATE TABLE records (
    id INTEGER PRIMARY KEY AUTOINCREMENT, unit INTEGER NOT NULL, name TEXT NOT NULL,
    duplicate_key BLOB NOT NULL, image TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX records_unit ON records (unit);
-- Which records are in it, and under which number and id: that follows from the order of job, source and unit,
-- never from the order in which work came in. final: the id of a record whose own one an earlier record has (~2).
CREATE TABLE corpus (
    source INTEGER NOT NULL, number INTEGER NOT NULL, record INTEGER NOT NULL, final TEXT, made TEXT,
    items INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (source, number)) WITHOUT ROWID;
CREATE UNIQUE INDEX corpus_record ON corpus (record);
-- A conversation: accepted, rejected or pending. id = record x 4096 + place in the record.
CREATE TABLE items (
    id INTEGER PRIMARY KEY, state INTEGER NOT NULL, suffix TEXT NOT NULL, form TEXT NOT NULL,
    language TEXT NOT NULL, kind TEXT NOT NULL, focus INTEGER, seed INTEGER NOT NULL,
    key BLOB, conversation BLOB, problems BLOB, prompt TEXT, answer TEXT);
CREATE INDEX items_rejected ON items (id) WHERE state = 1;
CREATE INDEX items_pending ON items (id) WHERE state = 2;
-- What was left out. unit: its id, or the source's id, negative, of what Store.arrange leaves out of the corpus.
CREATE TABLE drops (unit INTEGER NOT NULL, stage TEXT NOT NULL, reason TEXT NOT NULL,
    "where" TEXT NOT NULL, detail TEXT NOT NULL);
CREATE INDEX drops_unit ON drops (unit);

CREATE TRIGGER forget_source AFTER DELETE ON sources BEGIN
    DELETE FROM units WHERE source = old.id;
    DELETE FROM corpus WHERE source = old.id;
    DELETE FROM drops WHERE unit = -old.id;
END;
CREATE TRIGGER forget_unit AFTER DELETE ON units BEGIN
    DELETE FROM records WHERE unit = old.id;
    DELETE FROM drops WHERE unit = old.id;
    UPDATE sources SET arranged = NULL WHERE id = old.source;
END;
CREATE TRIGGER forget_record AFTER DELETE ON records BEGIN
    DELETE FROM items WHERE id BETWEEN old.id * 4096 AND old.id * 4096 + 4095;
END;

CREATE VIEW corpus_records AS
    SELECT c.source, c.number, c.made, r.id AS row, coalesce(c.final, r.name) AS id, r.body
    FROM corpus c CROSS JOIN records r ON r.id = c.record;
CREATE VIEW corpus_items AS
    SELECT c.source, c.number, c.record, c.final, i.*
    FROM corpus c CROSS JOIN items i ON i.id BETWEEN c.record * 4096 AND c.record * 4096 + 4095;
CREATE VIEW conversations AS
    SELECT i.*, coalesce(i.final, r.name) AS record_id, r.body
    FROM corpus_items i CROSS JOIN records r ON r.id = i.record;
CREATE VIEW corpus_drops AS
    SELECT u.source, u.place, d.rowid AS number, d.* FROM units u CROSS JOIN drops d ON d.unit = u.id
    WHERE u.place IS NOT NULL;
