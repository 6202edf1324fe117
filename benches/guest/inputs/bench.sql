-- Inserting in one transaction, an index, and selects of each kind.
CREATE TABLE sale (id INTEGER PRIMARY KEY, shop INTEGER, item TEXT, price REAL);
BEGIN;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000)
INSERT INTO sale SELECT i, (i * 7919) % 211, 'item-' || ((i * 104729) % 5003), ((i * 31) % 9973) / 8.0 FROM n;
COMMIT;
CREATE INDEX by_item ON sale (item);
SELECT shop, count(*), round(sum(price), 3) FROM sale GROUP BY shop ORDER BY 3 DESC LIMIT 5;
SELECT count(*) FROM sale a JOIN sale b ON a.item = b.item AND a.id < b.id;
SELECT item, max(price) FROM sale WHERE item LIKE 'item-4_2%' GROUP BY item ORDER BY item LIMIT 5;
UPDATE sale SET price = price * 1.25 WHERE shop % 3 = 0;
DELETE FROM sale WHERE id % 7 = 3;
SELECT count(*), round(avg(price), 6), min(item), max(length(item)) FROM sale;
