-- Which records of a source are in the corpus, under which numbers. Store.arrange keeps what was made of them
-- in "before". Of records with the same pixels and labels the first is kept, and :most is the limit.
CREATE TEMP TABLE before AS
    SELECT record, final, made, items FROM corpus WHERE source = :source AND made IS NOT NULL;
CREATE INDEX temp.before_record ON before (record);
DELETE FROM corpus WHERE source = :source;
DELETE FROM drops WHERE unit = -:source;

CREATE TEMP TABLE ranked AS
    SELECT record, copy,
        sum(copy = 1) OVER (ORDER BY place, record ROWS UNBOUNDED PRECEDING) AS number
    FROM (
        SELECT r.id AS record, u.place AS place,
            row_number() OVER (PARTITION BY r.duplicate_key ORDER BY u.place, r.id) AS copy
        FROM records r JOIN units u ON u.id = r.unit WHERE u.source = :source AND u.place IS NOT NULL);
INSERT INTO corpus (source, number, record)
    SELECT :source, number, record FROM ranked WHERE copy = 1 AND number <= :most ORDER BY number;
INSERT INTO drops
    SELECT -:source, 'record',
        CASE WHEN copy > 1 THEN 'duplicate picture' ELSE 'beyond the limit of this run' END,
        json_extract(CAST(r.body AS TEXT), '$.provenance.file'), r.name
    FROM ranked k JOIN records r ON r.id = k.record WHERE (copy > 1) = (number <= :most)
    ORDER BY copy = 1, number, record;
DROP TABLE temp.ranked;
