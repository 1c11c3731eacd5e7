//! The SQL that reads windows. Pure: text in, text out.
//!
//! A window is opened by one small question, its events are read by others, a page each. All of it uses the simple
//! protocol, without prepared statements, which a transaction-mode pooler has none of. Everything inlined is a number, a
//! snapshot or a list of numbers that this program formatted itself.
//!
//! A page is a plain `select`, whose constants `pg_stat_statements` leaves out; of `copy` each text would be an entry of its
//! own. Names and operators are those of `pg_catalog`, spelled out, and literals have their types:
//! nothing is resolved through a schema in which a stranger may make look-alikes.
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
use crate::position::{Position, Snapshot, Window};
use crate::source::EVENT_BYTES_MAX;

/// An aggregate type, aggregate id, event type or content type of more bytes is not sent; Kafka has no use for such names.
pub(super) const NAME_BYTES_MAX: usize = 64 << 10;

/// No compression of the server makes less than this part of a value. So of what is stored in less than this part of a
/// limit it is known, without reading it, that it is within the limit. (LZ4; `pglz` makes a 90th part.)
const COMPRESSION_MAX: usize = 255;

/// Every statement of a reader, whatever isolation the role or the database has by default. Under another level the
/// server would note what was read, and could refuse a writer for it.
fn in_transaction(select: &str) -> String {
    format!("begin isolation level read committed read only; {select}; commit")
}

/// What the row decoder reads, in its order, of the events `e`. Content above `event_bytes_max` is not sent; the last column
/// then tells how large it is. That the limit is kept is known without reading a value that is stored in few bytes.
///
/// The casts of columns cost nothing where a column has its type; one that a person gave another type, such as jsonb, is
/// converted or refused.
pub(super) fn columns(event_bytes_max: usize) -> String {
    let small = event_bytes_max / COMPRESSION_MAX;
    let stored = |column: &str| format!("pg_catalog.pg_column_size(e.{column})");
    let octets = |value: &str| format!("pg_catalog.octet_length({value})");
    let text = |column: &str| format!("e.{column}::pg_catalog.text");
    let json = |column: &str| {
        format!(
            "case when {stored} operator(pg_catalog.<=) {small} then e.{column}::pg_catalog.json \
                  when {octets} operator(pg_catalog.<=) {event_bytes_max} then e.{column}::pg_catalog.json end",
            stored = stored(column),
            octets = octets(&format!("e.{column}::pg_catalog.json::pg_catalog.text")),
        )
    };
    let name = |column: &str| {
        format!(
            "case when {octets} operator(pg_catalog.<=) {NAME_BYTES_MAX} then {text} end",
            octets = octets(&text(column)),
            text = text(column)
        )
    };
    let encoded = "e.payload_bytes::pg_catalog.bytea";
    format!(
        "e.id::pg_catalog.int8 as id, e.event_id::pg_catalog.uuid, {aggregate_type}, {aggregate_id}, \
         case when pg_catalog.octet_length(e.content_type::pg_catalog.text) operator(pg_catalog.>) {NAME_BYTES_MAX} \
              then null else {event_type} end, \
         {payload}, \
         case when pg_catalog.octet_length({encoded}) operator(pg_catalog.<=) {event_bytes_max} \
              then pg_catalog.encode({encoded}, 'hex') end, \
         {content_type}, {headers}, \
         pg_catalog.encode(pg_catalog.timestamptz_send(e.occurred_at::pg_catalog.timestamptz), 'hex'), \
         case when {payload_stored} operator(pg_catalog.>) {small} or {headers_stored} operator(pg_catalog.>) {small} \
                or pg_catalog.octet_length({encoded}) operator(pg_catalog.>) {small} \
              then {sizes} end, e.xid::pg_catalog.xid8",
        aggregate_type = name("aggregate_type"),
        aggregate_id = name("aggregate_id"),
        event_type = name("event_type"),
        payload = json("payload"),
        content_type = name("content_type"),
        headers = json("headers"),
        payload_stored = stored("payload"),
        headers_stored = stored("headers"),
        sizes = SIZES,
    )
}

/// How many bytes the content has.
const SIZES: &str = "coalesce(pg_catalog.octet_length(e.payload::pg_catalog.json::pg_catalog.text), 0)::pg_catalog.int8 \
                     operator(pg_catalog.+) coalesce(pg_catalog.octet_length(e.payload_bytes::pg_catalog.bytea), 0) \
                     operator(pg_catalog.+) coalesce(pg_catalog.octet_length(e.headers::pg_catalog.json::pg_catalog.text), 0)";

/// What the server can send of any row: the id, the `event_id`, and the three names as the bytes in which they are stored,
/// in hexadecimal digits; of a long one the digits of its SHA-256 digest, behind `~`.
fn skeleton_columns() -> String {
    let name = |column: &str| {
        let bytes = format!(
            "pg_catalog.convert_to(e.{column}::pg_catalog.text, pg_catalog.getdatabaseencoding())"
        );
        format!(
            "case when pg_catalog.octet_length(e.{column}::pg_catalog.text) operator(pg_catalog.<=) {NAME_BYTES_MAX} \
                  then pg_catalog.encode({bytes}, 'hex') \
                  else '~' operator(pg_catalog.||) pg_catalog.encode(pg_catalog.sha256({bytes}), 'hex') end"
        )
    };
    format!(
        "e.id::pg_catalog.int8 as id, e.event_id::pg_catalog.uuid, {}, {}, {}, \
         pg_catalog.encode(pg_catalog.timestamptz_send(e.occurred_at::pg_catalog.timestamptz), 'hex')",
        name("aggregate_type"),
        name("aggregate_id"),
        name("event_type"),
    )
}

/// The newest id that was handed out, 0 before the first.
///
/// The sequence's row alone does not tell: before the first id its `last_value` is 1 as well, and while a writer logs the
/// sequence ahead, it stands 32 too high for a moment, for whoever reads it without its lock. A value that is too high
/// makes a floor that leads. The function reads under the lock; the row is selected from all the same, so that a missing
/// right is an error on every version, and not a null.
pub(crate) const NEWEST_ID: &str = "(select case when s.is_called \
     then pg_catalog.pg_sequence_last_value('outbox.events_id_seq'::pg_catalog.regclass) else 0 end \
     from outbox.events_id_seq s)";

/// Changes when the sequence of the ids is made anew (truncate with restart identity, alter sequence … restart), and when
/// a relay has set it above the ids that it had handed out before.
const SEQUENCE_MARK: &str = "(pg_catalog.pg_relation_filenode('outbox.events_id_seq'::pg_catalog.regclass)::pg_catalog.text \
     operator(pg_catalog.||) '/' \
     operator(pg_catalog.||) coalesce((select pg_catalog.max(r.id) from outbox.resets r), 0)::pg_catalog.text)";

/// Late rows that lie this close to the floor at most are read with what lies above it.
const NEAR: i64 = 1_000;

/// What is believed of the ids of rows that a snapshot does not see.
#[derive(Clone, Debug)]
pub(super) struct Belief {
    /// The snapshot.
    pub(super) snapshot: Snapshot,
    /// No transaction at or above the end of the snapshot has an id at or below this one.
    pub(super) floor: EventId,
    /// None of those that were in progress has an id at or below this one.
    pub(super) late_from: EventId,
}

/// What the question that opens a window asks besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tried {
    /// Nothing.
    No,
    /// Whether the sequence is another one, and which is the newest row above the floor.
    Sequence,
    /// That, of all rows, and whether any contradicts the belief.
    Rows,
}

/// A page begins this many ids below its floor, to be contradicted: a sequence that was set back and has overtaken itself
/// has handed them out again. What the windows before have read of them is told by the snapshots.
const MARGIN: i64 = 64;

/// What opens a window: the newest id that was handed out; the snapshot, which is taken before that is looked up; what
/// changes with the sequence; whether a row contradicts the belief; the newest id of a row, where all are looked at.
pub(super) fn head(belief: &Belief, tried: Tried) -> String {
    let mark = match tried {
        Tried::No => "null::pg_catalog.text",
        Tried::Sequence | Tried::Rows => SEQUENCE_MARK,
    };
    let newest_row = |above: EventId| {
        format!(
            "(select e.id::pg_catalog.int8 from outbox.events e where e.id operator(pg_catalog.>) {above} \
               order by e.id desc limit 1)"
        )
    };
    let (contradicted, newest_row) = match tried {
        Tried::No => ("false".to_owned(), "null::pg_catalog.int8".to_owned()),
        // The partitions below need not be asked.
        Tried::Sequence => ("false".to_owned(), newest_row(belief.floor)),
        Tried::Rows => (contradicted(belief), newest_row(EventId(0))),
    };
    in_transaction(&format!(
        "select {NEWEST_ID}, pg_catalog.pg_current_snapshot()::pg_catalog.text, {mark}, {contradicted}, {newest_row}"
    ))
}

/// Whether there is a row that the belief says cannot be there. Through the index on `(xid, id)`, which has next to
/// nothing of transactions that the snapshot does not see.
fn contradicted(belief: &Belief) -> String {
    let Belief {
        snapshot,
        floor,
        late_from,
    } = belief;
    let mut tests = Vec::new();
    if floor.0 > 0 {
        tests.push(format!(
            "exists (select from outbox.events e \
                      where (e.xid, e.id) operator(pg_catalog.>=) ('{}'::pg_catalog.xid8, 0::pg_catalog.int8) \
                        and e.id operator(pg_catalog.<=) {floor})",
            snapshot.xmax
        ));
    }
    if late_from.0 > 0 && !snapshot.in_progress.is_empty() {
        tests.push(format!(
            "exists (select from pg_catalog.unnest('{{{}}}'::pg_catalog.xid8[]) as late (xid) \
                      cross join outbox.events e \
                      where e.xid operator(pg_catalog.=) late.xid \
                        and e.id operator(pg_catalog.<=) {late_from})",
            xid_list(snapshot.in_progress.iter().copied())
        ));
    }
    if tests.is_empty() {
        "false".to_owned()
    } else {
        format!("({})", tests.join(" or "))
    }
}

/// Which rows a page is of: those after `at.last_id` in the window of `at`.
#[derive(Clone, Copy)]
pub(super) struct Pick<'a> {
    pub(super) at: &'a Position,
    /// Rows of transactions that were in progress when the window began, and have ended in it, have ids above this one.
    pub(super) late_from: EventId,
    /// Empty, or begins with `and` and tells which of the events `e` are wanted.
    pub(super) condition: &'a str,
    pub(super) rows_max: usize,
    /// Ids above the floor that the page covers.
    pub(super) ids_max: i64,
}

/// The events of a page, in the columns of [`columns`].
pub(super) fn page(pick: Pick<'_>) -> String {
    in_transaction(&select(pick, &columns(EVENT_BYTES_MAX)))
}

/// The first row of a page that can't be read, in the columns of [`skeleton_columns`].
pub(super) fn skeleton(pick: Pick<'_>) -> String {
    let first = Pick {
        rows_max: 1,
        ..pick
    };
    in_transaction(&select(first, &skeleton_columns()))
}

/// Retained events by what is asked for and not by a cursor, in the columns of [`columns`].
pub(super) fn retained(
    (after, until): (EventId, EventId),
    condition: &str,
    rows_max: usize,
) -> String {
    in_transaction(&format!(
        "select {columns} from outbox.events e \
          where e.id operator(pg_catalog.>) {after} and e.id operator(pg_catalog.<=) {until} and {condition} \
          order by e.id limit {rows_max}",
        columns = columns(EVENT_BYTES_MAX)
    ))
}

fn select(pick: Pick<'_>, columns: &str) -> String {
    let Pick {
        at,
        late_from,
        condition,
        rows_max,
        ids_max,
    } = pick;
    let Window {
        prev,
        cur,
        floor,
        ceiling,
        next_floor: _,
    } = &*at.window;
    let last_id = at.last_id.0;
    let above = last_id.max(floor.0 - MARGIN);
    let end = ceiling.0.min(last_id.max(floor.0).saturating_add(ids_max));
    let ended = if at.last_id < *floor {
        xid_list(at.window.ended())
    } else {
        String::new()
    };
    let late_from = last_id.max(late_from.0 - MARGIN);
    let near = floor.0 - late_from <= NEAR;
    let from = if ended.is_empty() || !near {
        above
    } else {
        late_from.min(above)
    };
    let rows = format!(
        "select {columns} from outbox.events e \
          where e.id operator(pg_catalog.>) {from} and e.id operator(pg_catalog.<=) {end} \
            and pg_catalog.pg_visible_in_snapshot(e.xid, '{cur}'::pg_catalog.pg_snapshot) \
            and not pg_catalog.pg_visible_in_snapshot(e.xid, '{prev}'::pg_catalog.pg_snapshot) {condition} \
          order by e.id limit {rows_max}"
    );
    if ended.is_empty() || near {
        return rows;
    }
    // Where the two meet, no row is of both.
    let late = late_rows(&ended, condition, (late_from, above), rows_max, columns);
    // Late rows lie below the others, so this merge never interleaves; it is written all the same, because no document
    // promises the order of a bare `union all`.
    format!("select * from (({late}) union all ({rows})) page order by page.id limit {rows_max}")
}

/// Rows in a range of ids, of transactions, in id order.
///
/// Ordered by the pair, which is what only the index on `(xid, id)` can serve: with `xid = …` and `order by id` stale
/// statistics make the planner walk whole partitions along the primary key. The bounds of the id alone are for leaving out
/// the partitions below and above; without statistics, or with those of an empty table, the planner thinks them as good as
/// the comparisons of the pair, and would walk along the primary key after all and sort. The bounds of the xid tell it that
/// only one transaction is wanted (page of a million late rows: 0.5 s to 1.4 ms).
fn late_rows(
    ended: &str,
    condition: &str,
    (after, floor): (i64, i64),
    rows_max: usize,
    columns: &str,
) -> String {
    let pair = |id: i64| format!("(late.xid, {id}::pg_catalog.int8)");
    let (first, last) = (pair(after), pair(floor));
    format!(
        "select e.* from pg_catalog.unnest('{{{ended}}}'::pg_catalog.xid8[]) as late (xid) cross join lateral (\
            select {columns} from outbox.events e \
             where e.xid operator(pg_catalog.>=) late.xid and e.xid operator(pg_catalog.<=) late.xid \
               and (e.xid, e.id) operator(pg_catalog.>) {first} and (e.xid, e.id) operator(pg_catalog.<=) {last} \
               and e.id operator(pg_catalog.>) {after} and e.id operator(pg_catalog.<=) {floor} {condition} \
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
