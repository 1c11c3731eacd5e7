//! The SQL that reads windows. Pure: text in, text out.
//!
//! Sent with the simple protocol as `copy (…) to stdout (format binary)`: one round trip, no prepared statement (a
//! transaction-mode pooler has none), the fields as they lie on the wire. Everything inlined is a number or a list of
//! numbers that this program formatted itself.
//!
//! Three shapes, each of them cheap whatever the statistics say:
//! * the main range, a scan of the primary key; the visibility tests can't be served by any index. It is bounded at both
//!   ends by numbers that stand in the text: with stale statistics the planner prefers to sort what lies between them, and
//!   a range that is open to the end of the log would be sorted again for each page;
//! * late rows at or below the floor, found by transaction through the index on `(xid, id)`;
//! * the head of a new window: snapshot and newest id, read in the same statement as the first page.

use std::fmt::Write;

use crate::position::{Position, Window};

pub(super) const COLUMNS: &str = "e.id, e.event_id, e.aggregate_type, e.aggregate_id, e.event_type, e.payload, \
                       e.payload_bytes, e.content_type, e.headers, e.occurred_at";

/// The newest id that was handed out, 0 before the first.
///
/// The sequence's row alone does not tell: before the first id its `last_value` is 1 as well, and while a writer logs the
/// sequence ahead, it stands 32 too high for a moment, for whoever reads it without its lock. A value that is too high
/// makes a floor that leads. The function reads under the lock; the row is selected from all the same, so that a missing
/// right is an error on every version, and not a null.
pub(crate) const NEWEST_ID: &str = "(select case when s.is_called \
                                             then pg_sequence_last_value('outbox.events_id_seq') else 0 end \
                                        from outbox.events_id_seq s)";

/// Late rows lie below the main range, so this merge never interleaves; it is written all the same, because the order of
/// a bare `union all` is nobody's promise.
const MERGE: &str = "order by page.id";

/// Opens the window that follows `before`: a head row (ceiling as id, null, snapshot), then its first page.
///
/// The statement's own snapshot is `cur`, so rows that it sees need no test against `cur`. When the newest id is at the
/// floor no table is touched: the range is guarded by a condition on the head alone. Covers `ids_max` ids above the floor.
/// `condition` is empty, or begins with `and` and tells which of the events `e` are wanted.
pub(super) fn open_window(
    before: &Window,
    condition: &str,
    rows_max: usize,
    ids_max: i64,
) -> String {
    let prev = &before.cur;
    let floor = before.next_floor.0;
    let mut rows = String::new();
    let mut merge = "";
    if !prev.in_progress.is_empty() {
        merge = MERGE;
        let candidates = xid_list(prev.in_progress.iter());
        // Transactions still in progress are left to a later window without a look at the table.
        let ended = format!(
            "unnest('{{{candidates}}}'::xid8[]) as late (xid) \
             where pg_visible_in_snapshot(late.xid, pg_current_snapshot())"
        );
        let _ = write!(
            rows,
            "({}) union all ",
            late_rows(&ended, condition, (0, floor), rows_max)
        );
    }
    let _ = write!(
        rows,
        "(select page.* from head cross join lateral (\
            select {COLUMNS} from outbox.events e \
             where head.ceiling > {floor} and e.id > {floor} and e.id <= {} and e.id <= head.ceiling \
               and not pg_visible_in_snapshot(e.xid, '{prev}') {condition} \
             order by e.id limit {rows_max}) page)",
        floor.saturating_add(ids_max)
    );
    format!(
        "copy (\
         with head as materialized (\
            select {NEWEST_ID} as ceiling, pg_current_snapshot() as cur) \
         select ceiling, null::uuid, cur::text, '', '', null::json, null::bytea, null, null::json, \
                null::timestamptz from head \
         union all (select * from ({rows}) page {merge} limit {rows_max})\
         ) to stdout (format binary)"
    )
}

/// The page after `at.last_id` in the window of `at`. Covers `ids_max` ids above the floor.
pub(super) fn next_page(at: &Position, condition: &str, rows_max: usize, ids_max: i64) -> String {
    let Window {
        prev,
        cur,
        floor,
        ceiling,
        next_floor: _,
    } = &*at.window;
    let last_id = at.last_id.0;
    let after = last_id.max(floor.0);
    let mut rows = String::new();
    let mut merge = "";
    if at.last_id < *floor {
        let mut ended = prev
            .in_progress
            .iter()
            .filter(|xid| cur.sees(**xid))
            .peekable();
        if ended.peek().is_some() {
            merge = MERGE;
            let ended = format!("unnest('{{{}}}'::xid8[]) as late (xid)", xid_list(ended));
            let _ = write!(
                rows,
                "({}) union all ",
                late_rows(&ended, condition, (last_id, floor.0), rows_max)
            );
        }
    }
    let _ = write!(
        rows,
        "(select {COLUMNS} from outbox.events e \
           where e.id > {after} and e.id <= {} \
             and pg_visible_in_snapshot(e.xid, '{cur}') \
             and not pg_visible_in_snapshot(e.xid, '{prev}') {condition} \
           order by e.id limit {rows_max})",
        ceiling.0.min(after.saturating_add(ids_max))
    );
    format!("copy (select * from ({rows}) page {merge} limit {rows_max}) to stdout (format binary)")
}

/// Rows at or below the floor, in id order. They precede the main range, which lies above the floor.
///
/// Compared and ordered by the pair, which is what only the index on `(xid, id)` can serve: with `xid = …` and `order by id`
/// stale statistics make the planner walk whole partitions along the primary key. The bound of the id alone is for leaving
/// out the partitions above.
fn late_rows(ended: &str, condition: &str, (after, floor): (i64, i64), rows_max: usize) -> String {
    format!(
        "select e.* from (select late.xid from {ended}) late cross join lateral (\
            select {COLUMNS} from outbox.events e \
             where (e.xid, e.id) > (late.xid, {after}) and (e.xid, e.id) <= (late.xid, {floor}) and e.id <= {floor} \
               {condition} \
             order by e.xid, e.id limit {rows_max}) e \
         order by e.id limit {rows_max}"
    )
}

fn xid_list<'a>(xids: impl Iterator<Item = &'a u64>) -> String {
    let mut list = String::new();
    for xid in xids {
        if !list.is_empty() {
            list.push(',');
        }
        let _ = write!(list, "{xid}");
    }
    list
}
