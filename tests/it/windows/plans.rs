//! The plans of the statements over a million retained events, whatever the planner knows of them.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::Duration;

use outbox_relay::event::{EventId, Shard, Start};
use outbox_relay::position::Position;
use outbox_relay::source::PageLimits;
use outbox_relay::source::Source;
use outbox_relay::source::postgres::PostgresSource;
use serde_json::Value;
use sqlx::postgres::PgConnection;
use tokio::time::sleep;

use super::database::{Database, ask, sql, with_database};
use super::schedules::{Relay, small_partitions};

const RETAINED: u32 = 1_000_000;
const PAGE_ROWS: usize = 500;
const BUFFERS_MAX: u64 = 500;
/// Along the primary key these are far more buffers.
const LATE_BULK: u32 = 60_000;
/// What lies in the range of one statement.
const SORTED_MAX: u64 = 2_000;

fn fill(from: u32, to: u32) -> String {
    format!(
        "insert into outbox.events (aggregate_type, aggregate_id, event_type, payload) \
         select 'thing', 'e' || n % 1000, 'changed', '{{}}' from generate_series({from}, {to}) n"
    )
}

/// A plan that was run.
struct Ran {
    buffers: u64,
    rows: u64,
    shape: Value,
}

/// Opens a window, and explains its first page.
async fn open(connection: &mut PgConnection, source: &mut PostgresSource) -> Ran {
    source.open().await.expect("a window");
    explain(connection, source).await
}

async fn explain(connection: &mut PgConnection, source: &PostgresSource) -> Ran {
    let limits = PageLimits {
        rows: PAGE_ROWS,
        bytes: usize::MAX,
    };
    let statement = source.statement(limits);
    let select = statement
        .strip_prefix("begin isolation level read committed read only; ")
        .and_then(|rest| rest.strip_suffix("; commit"))
        .expect("a select in a transaction of its own");
    let text = ask(
        connection,
        &format!("explain (analyze, buffers, timing off, format json) {select}"),
    )
    .await;
    let explained: Value = serde_json::from_str(&text).expect("JSON");
    let plan = explained[0]["Plan"].clone();
    Ran {
        buffers: number(&plan, "Shared Hit Blocks") + number(&plan, "Shared Read Blocks"),
        rows: number(&plan, "Actual Rows"),
        shape: plan,
    }
}

/// The plan in a line for each node.
fn digest(node: &Value, depth: usize, text: &mut String) {
    let of = |name: &str| node[name].as_str().unwrap_or_default();
    writeln!(
        text,
        "{:depth$}{} {} {} [{}] rows {} loops {} removed {} buffers {}",
        "",
        of("Node Type"),
        of("Relation Name"),
        of("Index Name"),
        of("Index Cond"),
        node["Actual Rows"],
        node["Actual Loops"],
        node["Rows Removed by Filter"],
        number(node, "Shared Hit Blocks") + number(node, "Shared Read Blocks"),
    )
    .expect("write to a string");
    for child in node["Plans"].as_array().into_iter().flatten() {
        digest(child, depth + 2, text);
    }
}

fn number(node: &Value, name: &str) -> u64 {
    // Some versions write 1.00.
    let number = node[name]
        .as_f64()
        .unwrap_or_else(|| panic!("no {name} in {node}"));
    format!("{number:.0}").parse().expect("a whole number")
}

fn each<'a>(node: &'a Value, visit: &mut impl FnMut(&'a Value)) {
    visit(node);
    for child in node["Plans"].as_array().into_iter().flatten() {
        each(child, visit);
    }
}

impl Ran {
    /// Populated partitions are found through an index, with bounds at both ends or by transaction, and what is sorted
    /// has a limit that stands in the statement.
    fn check(&self, what: &str, populated: &[String]) {
        let print = || self.digest();
        each(&self.shape, &mut |node| {
            let kind = node["Node Type"].as_str().expect("a kind");
            let relation = node["Relation Name"].as_str().unwrap_or_default();
            if populated.iter().any(|partition| partition == relation) {
                assert!(
                    ["Index Scan", "Bitmap Heap Scan"].contains(&kind),
                    "{what}: {kind} of {relation}\n{}",
                    print()
                );
            }
            if let (Some(index), Some(bounds)) =
                (node["Index Name"].as_str(), node["Index Cond"].as_str())
            {
                let numbers = |sign: &str| {
                    let ends = bounds.split(sign).skip(1);
                    ends.filter(|end| end.starts_with(|c: char| c.is_ascii_digit()))
                        .count()
                };
                let in_range =
                    index.ends_with("_pkey") && numbers("id > ") + numbers("id <= ") == 2;
                let of_transaction =
                    index.contains("xid_id") && bounds.matches("ROW(xid, id)").count() == 2;
                assert!(
                    in_range || of_transaction,
                    "{what}: {index}: {bounds}\n{}",
                    print()
                );
            }
            if kind.contains("Sort") && number(node, "Actual Loops") > 0 {
                let sorted = number(&node["Plans"][0], "Actual Rows");
                assert!(
                    sorted <= SORTED_MAX,
                    "{what}: sorts {sorted} rows\n{}",
                    print()
                );
            }
            assert!(!kind.contains("Gather"), "{what}\n{}", print());
        });
    }

    /// Nothing is found, and next to nothing looked at. Transactions of other tests that ended since the last window are
    /// looked for: nobody can tell from a transaction id that it is another database's.
    fn check_idle(&self, state: &str) {
        assert_eq!(self.rows, 0, "{state}: idle\n{}", self.digest());
        self.check_buffers(&format!("{state}: idle"));
    }

    /// Planning looks at each partition that the bounds leave in: those where the events are, whatever is retained.
    fn check_partitions(&self, what: &str) {
        let mut partitions = BTreeSet::new();
        each(&self.shape, &mut |node| {
            partitions.extend(node["Relation Name"].as_str());
        });
        assert!(
            partitions.len() <= 2,
            "{what}: {partitions:?}\n{}",
            self.digest()
        );
    }

    fn digest(&self) -> String {
        let mut text = String::new();
        digest(&self.shape, 0, &mut text);
        text
    }

    fn check_buffers(&self, what: &str) {
        println!("{what}: {} rows, {} buffers", self.rows, self.buffers);
        assert!(
            self.buffers < BUFFERS_MAX,
            "{what}: {} buffers\n{}",
            self.buffers,
            self.digest()
        );
    }
}

async fn populated(connection: &mut PgConnection) -> Vec<String> {
    let names = ask(
        connection,
        "select string_agg(distinct tableoid::regclass::text, ' ') from outbox.events",
    )
    .await;
    names
        .split(' ')
        .map(|name| name.trim_start_matches("outbox.").to_owned())
        .collect()
}

/// Statistics as they are for a table that nobody has analyzed.
const FORGET: &str = "delete from pg_statistic where starelid in \
        (select inhrelid from pg_inherits where inhparent = 'outbox.events'::regclass \
         union all select 'outbox.events'::regclass); \
     update pg_class set reltuples = -1, relpages = 0 where oid in \
        (select inhrelid from pg_inherits where inhparent = 'outbox.events'::regclass \
         union all select indexrelid from pg_inherits join pg_index on indrelid = inhrelid \
                    where inhparent = 'outbox.events'::regclass)";

#[tokio::test]
async fn plans_over_a_million_events() {
    with_database("plans_over_a_million_events", async |database| {
        small_partitions(database, 14, 100_000).await;
        let mut connection = database.connect().await;
        sql(
            &mut connection,
            "do $$ declare p regclass; begin
                for p in select inhrelid from pg_inherits where inhparent = 'outbox.events'::regclass loop
                    execute format('alter table %s set (autovacuum_enabled = off)', p);
                end loop; end $$",
        )
        .await;
        // Known to the planner as it is now: nearly empty.
        sql(&mut connection, &fill(1, 50)).await;
        sql(&mut connection, "analyze outbox.events").await;
        for n in 0..20 {
            let step = RETAINED / 20;
            sql(&mut connection, &fill(n * step + 51, (n + 1) * step)).await;
        }
        let populated = populated(&mut connection).await;
        assert!(populated.len() >= 10, "{populated:?}");
        for (state, prepare) in [
            ("stale statistics", ""),
            ("no statistics", FORGET),
            ("full statistics", "analyze outbox.events"),
        ] {
            sql(&mut connection, prepare).await;
            in_state(database, &mut connection, state, &populated).await;
        }
    })
    .await;
}

async fn in_state(
    database: &Database,
    connection: &mut PgConnection,
    state: &str,
    populated: &[String],
) {
    sql(connection, "truncate outbox.cursors, outbox.leases").await;
    let mut late = database.connect().await;

    let mut relay = Relay::start(database, Start::Latest).await;
    everybody_is_known(connection).await;
    settle(&mut relay).await;
    let idle = open(connection, &mut relay.source).await;
    idle.check_idle(state);
    // The snapshot moves, with transactions of others, and still nothing is read.
    sql(connection, "select pg_current_xact_id()").await;
    sql(&mut late, "begin; select pg_current_xact_id()").await;
    sql(connection, "select pg_current_xact_id()").await;
    settle(&mut relay).await;
    let idle = open(connection, &mut relay.source).await;
    idle.check_idle(state);
    sql(&mut late, "rollback").await;

    settle(&mut relay).await;
    sql(connection, &fill(1, 100)).await;
    let what = format!("{state}: open a window");
    let ran = open(connection, &mut relay.source).await;
    assert_eq!(ran.rows, 100);
    ran.check(&what, populated);
    ran.check_buffers(&what);
    ran.check_partitions(&what);
    settle(&mut relay).await;

    // One that is left behind: others commit after it, and it commits late.
    for (what, others) in [("late rows nearby", 10), ("late rows", 1_000)] {
        let what = format!("{state}: {what}");
        sql(&mut late, &format!("begin; {}", fill(1, 10))).await;
        for _ in 0..3 {
            sql(connection, &fill(1, others)).await;
            settle(&mut relay).await;
        }
        let ran = open(connection, &mut relay.source).await;
        assert_eq!(ran.rows, 0, "not ended yet");
        ran.check_buffers(&format!("{what} that are not there yet"));
        settle(&mut relay).await;
        sql(&mut late, "commit").await;
        sql(connection, &fill(1, 100)).await;
        let ran = open(connection, &mut relay.source).await;
        assert_eq!(ran.rows, 110);
        ran.check(&what, populated);
        ran.check_buffers(&what);
        ran.check_partitions(&what);
    }
    // The same window from its first rows on.
    let page = relay.page(5).await;
    assert_eq!(page.events.len(), 5);
    relay.source.seek(page.end);
    let ran = explain(connection, &relay.source).await;
    assert_eq!(ran.rows, 105);
    ran.check(&format!("{state}: next page with late rows"), populated);
    ran.check_buffers(&format!("{state}: next page with late rows"));

    // One that is left behind with many rows, of which each page looks at its own only.
    settle(&mut relay).await;
    sql(&mut late, &format!("begin; {}", fill(1, LATE_BULK))).await;
    for _ in 0..3 {
        sql(connection, &fill(1, 1_000)).await;
        settle(&mut relay).await;
    }
    sql(&mut late, "commit").await;
    let ran = open(connection, &mut relay.source).await;
    ran.check(&format!("{state}: late bulk"), populated);
    ran.check_buffers(&format!("{state}: late bulk"));
    let page = relay.page(5).await;
    let middle = page.events[0].id.0 + i64::from(LATE_BULK) / 2;
    relay.source.seek(Position {
        last_id: EventId(middle),
        ..page.end
    });
    let ran = explain(connection, &relay.source).await;
    assert_eq!(ran.rows, PAGE_ROWS as u64);
    ran.check(&format!("{state}: late bulk, next page"), populated);
    ran.check_buffers(&format!("{state}: late bulk, next page"));

    // A backlog: its pages, and the window after it.
    sql(connection, "truncate outbox.cursors, outbox.leases").await;
    let mut relay = Relay::start(database, Start::Earliest).await;
    let ran = open(connection, &mut relay.source).await;
    ran.check(&format!("{state}: first page of a backlog"), populated);
    ran.check_buffers(&format!("{state}: first page of a backlog"));
    let page = relay.page(5).await;
    for last_id in [5, 450_000, 950_000] {
        let at = Position {
            last_id: EventId(last_id),
            ..page.end.clone()
        };
        let (mut shard, _) = database.shard(Shard { index: 1, count: 4 }, "nobody");
        shard.seek(at.clone());
        let ran = explain(connection, &shard).await;
        assert_eq!(ran.rows, PAGE_ROWS as u64);
        ran.check(&format!("{state}: next page of a shard"), populated);
        ran.check_buffers(&format!("{state}: next page of a shard"));
        relay.source.seek(at);
        let ran = explain(connection, &relay.source).await;
        assert_eq!(ran.rows, PAGE_ROWS as u64);
        ran.check(&format!("{state}: next page"), populated);
        ran.check_buffers(&format!("{state}: next page"));
    }
    let done = Position {
        last_id: page.end.window.ceiling,
        ..page.end
    };
    relay.source.seek(done.clone());
    relay.acknowledge(done).await;
    sql(connection, &fill(1, 100)).await;
    let ran = open(connection, &mut relay.source).await;
    assert_eq!(ran.rows, 100);
    ran.check_buffers(&format!("{state}: the window after a backlog"));
}

/// Waits for the end of the transactions of other tests that a relay found in progress when it started: it does not know
/// where their events would be.
async fn everybody_is_known(connection: &mut PgConnection) {
    let begun = ask(
        connection,
        "select pg_snapshot_xmax(pg_current_snapshot())::text",
    )
    .await;
    let ended = format!("select (pg_snapshot_xmin(pg_current_snapshot()) >= '{begun}')::text");
    while ask(connection, &ended).await != "true" {
        sql(connection, "select pg_current_xact_id()").await;
        sleep(Duration::from_millis(10)).await;
    }
}

/// Reads to the end, and lets the floor follow.
async fn settle(relay: &mut Relay<'_>) {
    loop {
        let page = relay.page(PAGE_ROWS).await;
        if page.events.is_empty() {
            return;
        }
        relay.acknowledge(page.end).await;
    }
}
