//! The SQL that reads windows. Pure: text in, text out.
//!
//! A window is opened by one small question, its events are read by others, a page each, as `copy (…) to stdout (format
//! binary)`: the fields as they lie on the wire. All of it uses the simple protocol, without prepared statements, which a
//! transaction-mode pooler has none of. Everything inlined is a number or a list of numbers that this program formatted
//! itself.
//!
//! Planning costs more than running at the end of the log, and it grows with the partitions that a statement may touch. So a
//! page names the ids between which its rows lie, in numbers that stand in the text: that leaves one partition or two.
//! Two shapes, each of them cheap whatever the statistics say:
//! * a range of the primary key; the visibility tests can't be served by any index. It is bounded at both ends: with stale
//!   statistics the planner prefers to sort what lies between them, and a range that is open to the end of the log would be
//!   sorted again for each page;
//! * late rows far below the floor, found by transaction through the index on `(xid, id)`.

use std::fmt::Write;

use crate::event::EventId;
use crate::position::{Position, Window};

/// As the types that are decoded. Of a column that has its type this costs nothing; one that somebody gave another type, such as
/// jsonb, is converted or refused.
pub(super) const COLUMNS: &str = "e.id::bigint, e.event_id::uuid, e.aggregate_type::text, e.aggregate_id::text, \
                       e.event_type::text, e.payload::json, e.payload_bytes::bytea, e.content_type::text, \
                       e.headers::json, e.occurred_at::timestamptz";

/// The newest id that was handed out, 0 before the first.
///
/// The sequence's row alone does not tell: before the first id its `last_value` is 1 as well, and while a writer logs the
/// sequence ahead, it stands 32 too high for a moment, for whoever reads it without its lock. A value that is too high
/// makes a floor that leads. The function reads under the lock; the row is selected from all the same, so that a missing
/// right is an error on every version, and not a null.
pub(crate) const NEWEST_ID: &str = "(select case when s.is_called \
                                             then pg_sequence_last_value('outbox.events_id_seq') else 0 end \
                                        from outbox.events_id_seq s)";

/// Late rows that lie this close to the floor at most are read with what lies above it.
const NEAR: i64 = 1_000;

/// What opens a window: the newest id and the snapshot, which is taken before that is looked up.
pub(super) fn head() -> String {
    format!("select {NEWEST_ID}, pg_current_snapshot()::text")
}

/// The page after `at.last_id` in the window of `at`. Covers `ids_max` ids above the floor. Rows of transactions that were in
/// progress when the window began, and have ended in it, have ids above `late_from`. `condition` is empty, or begins with
/// `and` and tells which of the events `e` are wanted.
pub(super) fn page(
    at: &Position,
    late_from: EventId,
    condition: &str,
    rows_max: usize,
    ids_max: i64,
) -> String {
    let Window {
        prev,
        cur,
        floor,
        ceiling,
        next_floor: _,
    } = &*at.window;
    let last_id = at.last_id.0;
    let above = last_id.max(floor.0);
    let end = ceiling.0.min(above.saturating_add(ids_max));
    let ended = if at.last_id < *floor {
        xid_list(at.window.ended())
    } else {
        String::new()
    };
    let late_from = last_id.max(late_from.0);
    let near = floor.0 - late_from <= NEAR;
    let from = if ended.is_empty() || !near {
        above
    } else {
        late_from
    };
    let rows = format!(
        "select {COLUMNS} from outbox.events e \
          where e.id > {from} and e.id <= {end} \
            and pg_visible_in_snapshot(e.xid, '{cur}') \
            and not pg_visible_in_snapshot(e.xid, '{prev}') {condition} \
          order by e.id limit {rows_max}"
    );
    if ended.is_empty() || near {
        return format!("copy ({rows}) to stdout (format binary)");
    }
    let late = late_rows(&ended, condition, (late_from, floor.0), rows_max);
    // Late rows lie below the others, so this merge never interleaves; it is written all the same, because the order of a
    // bare `union all` is nobody's promise.
    format!(
        "copy (select * from (({late}) union all ({rows})) page order by page.id limit {rows_max}) \
         to stdout (format binary)"
    )
}

/// Rows in a range of ids, of transactions, in id order.
///
/// Ordered by the pair, which is what only the index on `(xid, id)` can serve: with `xid = …` and `order by id` stale
/// statistics make the planner walk whole partitions along the primary key. The bounds of the id alone are for leaving out
/// the partitions below and above; without statistics, or with those of an empty table, the planner thinks them as good as
/// the comparisons of the pair, and would walk along the primary key after all and sort. The bounds of the xid tell it that
/// only one transaction is wanted (page of a million late rows: 0.5 s to 1.4 ms).
fn late_rows(ended: &str, condition: &str, (after, floor): (i64, i64), rows_max: usize) -> String {
    format!(
        "select e.* from unnest('{{{ended}}}'::xid8[]) as late (xid) cross join lateral (\
            select {COLUMNS} from outbox.events e \
             where e.xid >= late.xid and e.xid <= late.xid \
               and (e.xid, e.id) > (late.xid, {after}) and (e.xid, e.id) <= (late.xid, {floor}) \
               and e.id > {after} and e.id <= {floor} {condition} \
             order by e.xid, e.id limit {rows_max}) e \
         order by e.id limit {rows_max}"
    )
}

fn xid_list(xids: impl Iterator<Item = u64>) -> String {
    let mut list = String::new();
    for xid in xids {
        if !list.is_empty() {
            list.push(',');
        }
        let _ = write!(list, "{xid}");
    }
    list
}
