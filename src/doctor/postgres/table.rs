//! Looks at the shape of `outbox.events`: columns and their order, indexes, sequence, trigger, partitions.
//!
//! Asks the catalogs only, so that it needs no rights on the table and costs the same however large it is.

use anyhow::Context;
use serde::Deserialize;
use sqlx::postgres::PgConnection;

use super::super::Finding;
use super::partitions::{self, Partition};
use crate::migrate::objects;
use crate::retention;
use crate::source::postgres::{CaptureMode, ask};

/// Column and type.
const COLUMNS: [(&str, &str); 11] = [
    ("xid", "xid8"),
    ("id", "bigint"),
    ("event_id", "uuid"),
    ("aggregate_type", "text"),
    ("aggregate_id", "text"),
    ("event_type", "text"),
    ("payload", "json"),
    ("payload_bytes", "bytea"),
    ("content_type", "text"),
    ("headers", "json"),
    ("occurred_at", "timestamp with time zone"),
];

/// The default that the migrations give a column, as the server writes it.
fn migrated_default(name: &str) -> Option<String> {
    let name = format!("outbox.events.{name}");
    let column = objects::expected()
        .into_iter()
        .find(|object| object.kind == "column" && object.name == name)?;
    let (_, default) = column.definition.split_once("default ")?;
    Some(default.to_owned())
}

const EXISTS: &str = "
select exists (
    select from pg_class c join pg_namespace s on s.oid = c.relnamespace
     where s.nspname = 'outbox' and c.relname = 'events') as answer";

const FACTS: &str = "
select c.relkind = 'p' as partitioned,
       -- Asks for this role; owners and those that bypass row security are not held up by it.
       row_security_active(c.oid) and not coalesce((
            select bool_or(y.polpermissive and pg_get_expr(y.polqual, y.polrelid) = 'true')
                   and bool_and(y.polpermissive)
              from pg_policy y
             where y.polrelid = c.oid and y.polcmd in ('r', '*')
               and exists (select from unnest(y.polroles) p (role)
                            where p.role = 0 or pg_has_role(current_user, p.role, 'usage'))), false) as row_security,
       current_user::text as role,
       (select coalesce(json_agg(a order by a.attnum), '[]') from (
            select a.attname as name, format_type(a.atttypid, a.atttypmod) as type,
                   regexp_replace(trim(pg_get_expr(d.adbin, d.adrelid), chr(10) || ' '), '[[:space:]]+', ' ', 'g') as \"default\", a.attnum
              from pg_attribute a
              left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
             where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped) a) as columns,
       (select coalesce(json_agg(i), '[]') from (
            select i.indisunique as is_unique, i.indisvalid as is_valid,
                   (select json_agg(a.attname order by k.n)
                      from unnest(i.indkey::int2[]) with ordinality k (attnum, n)
                      join pg_attribute a on a.attrelid = c.oid and a.attnum = k.attnum) as columns
              from pg_index i
             where i.indrelid = c.oid and i.indpred is null) i) as indexes,
       (select row_to_json(q) from (
            select q.seqcache as cache, q.seqincrement as increment, q.seqcycle as cycle
              from pg_sequence q
              join pg_class qc on qc.oid = q.seqrelid and qc.relname = 'events_id_seq'
               and qc.relnamespace = c.relnamespace) q) as sequence,
       -- O and A fire for a service's transactions, D and R do not.
       (select t.tgenabled in ('O', 'A') from pg_trigger t
         where t.tgrelid = c.oid and t.tgname = 'events_notify') as notifies,
       (select coalesce(json_agg(p), '[]') from (
            select (regexp_match(pg_get_expr(pc.relpartbound, pc.oid), 'FROM [(]''?(-?[0-9]+)''?[)]'))[1]::bigint as lower,
                   (regexp_match(pg_get_expr(pc.relpartbound, pc.oid), 'TO [(]''?(-?[0-9]+)''?[)]'))[1]::bigint as upper,
                   pg_get_expr(pc.relpartbound, pc.oid) = 'DEFAULT' as is_default,
                   pc.relpersistence = 'u' as unlogged,
                   pc.oid::regclass::text as name,
                   pg_relation_size(pc.oid) as bytes
              from pg_inherits h
              join pg_class pc on pc.oid = h.inhrelid
             where h.inhparent = c.oid) p) as partitions,
       (select case when has_sequence_privilege(qc.oid, 'select') or has_sequence_privilege(qc.oid, 'usage')
                    then coalesce(pg_sequence_last_value(qc.oid), 0) end
          from pg_class qc
         where qc.relname = 'events_id_seq' and qc.relnamespace = c.relnamespace) as newest_id
  from pg_class c
  join pg_namespace s on s.oid = c.relnamespace
 where s.nspname = 'outbox' and c.relname = 'events'";

#[derive(Deserialize)]
struct Answer {
    answer: bool,
}

#[derive(Clone, Debug, Deserialize)]
struct Facts {
    partitioned: bool,
    row_security: bool,
    role: String,
    columns: Vec<Column>,
    indexes: Vec<Index>,
    sequence: Option<Sequence>,
    /// None when there is no such trigger.
    notifies: Option<bool>,
    partitions: Vec<Partition>,
    newest_id: Option<i64>,
}

#[derive(Clone, Debug, Deserialize)]
struct Column {
    name: String,
    r#type: String,
    default: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct Index {
    is_unique: bool,
    is_valid: bool,
    /// None of an index on expressions alone.
    columns: Option<Vec<String>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Sequence {
    cache: i64,
    increment: i64,
    cycle: bool,
}

pub(super) async fn exists(connection: &mut PgConnection) -> Result<bool, anyhow::Error> {
    let Answer { answer } = ask::one(connection, EXISTS)
        .await
        .context("look for outbox.events")?;
    Ok(answer)
}

pub(super) async fn examine(
    connection: &mut PgConnection,
    mode: CaptureMode,
    retention: &retention::Settings,
) -> Result<Vec<Finding>, anyhow::Error> {
    let facts: Facts = ask::one(connection, FACTS)
        .await
        .context("ask about outbox.events")?;
    let mut findings = columns(&facts.columns);
    findings.extend(order(&facts.columns));
    findings.extend(indexes(&facts.indexes));
    findings.extend(sequence(facts.sequence.as_ref()));
    findings.extend(row_security(&facts));
    findings.extend(trigger(facts.notifies, mode));
    if facts.partitioned {
        findings.extend(partitions::judge(
            &facts.partitions,
            facts.newest_id,
            retention,
        ));
    } else {
        findings.push(partitions::none());
    }
    Ok(findings)
}

fn columns(columns: &[Column]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, expected) in COLUMNS {
        let default = migrated_default(name);
        let Some(column) = columns.iter().find(|column| column.name == name) else {
            findings.push(
                Finding::error(
                    "columns",
                    format!("outbox.events has no column {name}"),
                    "the relay reads it",
                )
                .sql(add_column(name, expected, default.as_deref())),
            );
            continue;
        };
        let fits = column.r#type == expected
            || (expected == "text" && column.r#type.starts_with("character varying"));
        if !fits {
            findings.push(
                Finding::error(
                    "columns",
                    format!(
                        "column {name} of outbox.events is {}, not {expected}",
                        column.r#type
                    ),
                    "the relay reads the column as it lies on the wire, and would read something else",
                )
                .sql(format!(
                    "alter table outbox.events alter column {name} type {expected} using {name}::{expected}"
                )),
            );
        }
        // Where the columns stand in the wrong order, this makes up for it.
        let asks_first = name == "id" && column.default.as_deref() == Some(ASKS_FIRST);
        if let Some(default) = default.filter(|default| column.default.as_ref() != Some(default))
            && !asks_first
        {
            findings.push(wrong_default(name, column.default.as_deref(), &default));
        }
    }
    findings
}

fn add_column(name: &str, expected: &str, default: Option<&str>) -> String {
    let default = default.map_or(String::new(), |default| {
        let required = if name == "headers" { "" } else { " not null" };
        format!("{required} default {default}")
    });
    let grant = match name {
        "xid" | "id" => String::new(),
        _ => format!("; grant insert ({name}) on outbox.events to outbox_writer"),
    };
    format!("alter table outbox.events add column {name} {expected}{default}{grant}")
}

fn wrong_default(name: &str, found: Option<&str>, expected: &str) -> Finding {
    let what = format!(
        "the default of column {name} of outbox.events is {}",
        found.unwrap_or("missing")
    );
    let finding = match name {
        "xid" | "id" => Finding::error(
            "columns",
            what,
            "the relay finds events by the transaction and the number that the defaults give them",
        ),
        "occurred_at" => Finding::warning(
            "columns",
            what,
            "now() is the start of the transaction: ages, latencies and the time of the records are off by its length",
        ),
        "headers" => Finding::warning("columns", what, "what outbox.context sets is not published"),
        _ => Finding::warning("columns", what, "writers have to give it themselves"),
    };
    finding.sql(format!(
        "alter table outbox.events alter column {name} set default {expected}"
    ))
}

/// A default of id that takes the number of the transaction first, as the server writes it.
const ASKS_FIRST: &str = "CASE WHEN (pg_current_xact_id() IS NOT NULL) THEN nextval('outbox.events_id_seq'::regclass) ELSE \
                          NULL::bigint END";

/// Defaults are evaluated in column order. A default of id that asks for the transaction itself is as good.
fn order(columns: &[Column]) -> Option<Finding> {
    let place = |name: &str| columns.iter().position(|column| column.name == name);
    let (xid, id) = (place("xid")?, place("id")?);
    let asks_first = columns[id].default.as_deref() == Some(ASKS_FIRST);
    (xid > id && !asks_first).then(|| {
        Finding::error(
            "column_order",
            "column id of outbox.events stands before column xid",
            "an event gets its id before its transaction has a number, so that the relay may pass it by: events are lost",
        )
        // Columns can't be moved; this makes the default of id take the transaction's number first, which is the point.
        .sql(
            "alter table outbox.events alter column id set default \
             case when pg_current_xact_id() is not null then nextval('outbox.events_id_seq') end",
        )
    })
}

fn indexes(indexes: &[Index]) -> Vec<Finding> {
    let starts_with = |index: &Index, wanted: &[&str]| {
        index.is_valid
            && index
                .columns
                .as_ref()
                .is_some_and(|columns| columns.iter().take(wanted.len()).eq(wanted))
    };
    let mut findings = Vec::new();
    let by_id = indexes
        .iter()
        .any(|index| index.is_unique && starts_with(index, &["id"]));
    if !by_id {
        findings.push(
            Finding::error(
                "indexes",
                "outbox.events has no primary key on id",
                "every page would read the whole table, and two events could have one id",
            )
            .sql("alter table outbox.events add constraint events_pkey primary key (id)"),
        );
    }
    if !indexes
        .iter()
        .any(|index| starts_with(index, &["xid", "id"]))
    {
        findings.push(
            Finding::error(
                "indexes",
                "outbox.events has no index on (xid, id)",
                "events of transactions that commit late are found by it; without it they are looked for in whole partitions",
            )
            .sql("create index events_xid_id on outbox.events (xid, id)"),
        );
    }
    findings
}

fn sequence(sequence: Option<&Sequence>) -> Vec<Finding> {
    let Some(sequence) = sequence else {
        return vec![
            Finding::error(
                "sequence",
                "there is no sequence outbox.events_id_seq",
                "ids come from it, and it says which is the newest",
            )
            .sql(
                "create sequence outbox.events_id_seq as bigint cache 1 owned by outbox.events.id; \
                 select setval('outbox.events_id_seq', (select coalesce(max(id), 0) + 1 from outbox.events), false)",
            ),
        ];
    };
    let Sequence {
        cache,
        increment,
        cycle,
    } = *sequence;
    let mut findings = Vec::new();
    if cache != 1 {
        findings.push(
            Finding::error(
                "sequence_cache",
                format!("the sequence outbox.events_id_seq hands out ids in blocks of {cache}"),
                "each session takes its ids from its own block, so that ids say nothing about the order: events of one \
                 entity may be published in the wrong order, or not at all",
            )
            .sql("alter sequence outbox.events_id_seq cache 1"),
        );
    }
    if increment < 1 || cycle {
        findings.push(
            Finding::error(
                "sequence",
                format!(
                    "the sequence outbox.events_id_seq does not ascend for ever (increment {increment}, cycle {cycle})"
                ),
                "the relay never looks below an id that it has passed",
            )
            .sql("alter sequence outbox.events_id_seq increment 1 no cycle"),
        );
    }
    findings
}

fn row_security(facts: &Facts) -> Option<Finding> {
    facts.row_security.then(|| {
        Finding::error(
            "row_security",
            format!(
                "row-level security of outbox.events may hide rows from {}",
                facts.role
            ),
            "rows that a policy hides are not published, without a word",
        )
        .sql(format!(
            "alter role {} bypassrls",
            ask::identifier(&facts.role)
        ))
    })
}

fn trigger(notifies: Option<bool>, mode: CaptureMode) -> Option<Finding> {
    let silent = "the relay is not woken by a commit and finds the event by its slow poll, up to a second late";
    match (mode, notifies) {
        (CaptureMode::Listen, None) => Some(
            Finding::warning("notify_trigger", "the trigger events_notify is missing", silent).sql(
                "create trigger events_notify after insert on outbox.events \
                 for each statement execute function outbox.notify_relay()",
            ),
        ),
        (CaptureMode::Listen, Some(false)) => Some(
            Finding::warning("notify_trigger", "the trigger events_notify is disabled", silent)
                .sql("alter table outbox.events enable trigger events_notify"),
        ),
        (CaptureMode::Poll, Some(true)) => Some(
            Finding::note(
                "notify_trigger",
                "the trigger events_notify is enabled, and the relay polls (source.postgres.capture)",
                "writers pay for notifications that nobody hears",
            )
            .sql("alter table outbox.events disable trigger events_notify"),
        ),
        (CaptureMode::Listen, Some(true)) | (CaptureMode::Poll, None | Some(false)) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Severity;

    fn column(name: &str, r#type: &str, default: Option<&str>) -> Column {
        Column {
            name: name.to_owned(),
            r#type: r#type.to_owned(),
            default: default.map(str::to_owned),
        }
    }

    fn as_migrated() -> Vec<Column> {
        COLUMNS
            .iter()
            .map(|(name, r#type)| column(name, r#type, migrated_default(name).as_deref()))
            .collect()
    }

    #[test]
    fn the_migrated_columns_are_right() {
        assert_eq!(columns(&as_migrated()), []);
        assert_eq!(order(&as_migrated()), None);
    }

    #[test]
    fn the_order_counts_unless_the_default_makes_up_for_it() {
        let mut swapped = as_migrated();
        swapped.swap(0, 1);
        assert_eq!(order(&swapped).unwrap().severity, Severity::Error);
        swapped[0].default = Some(ASKS_FIRST.to_owned());
        assert_eq!(order(&swapped), None);
        assert_eq!(columns(&swapped), []);
    }

    #[test]
    fn types_and_defaults_are_compared() {
        let mut found = as_migrated();
        found[6] = column("payload", "jsonb", None);
        found[3] = column("aggregate_type", "character varying(64)", None);
        found[10] = column("occurred_at", "timestamp with time zone", Some("now()"));
        found[1] = column(
            "id",
            "bigint",
            Some("public.nextval('outbox.events_id_seq'::text)"),
        );
        found.remove(8);
        let found: Vec<_> = columns(&found)
            .into_iter()
            .map(|finding| (finding.severity, finding.what))
            .collect();
        assert_eq!(
            found,
            [
                (
                    Severity::Error,
                    "the default of column id of outbox.events is public.nextval('outbox.events_id_seq'::text)"
                        .to_owned()
                ),
                (
                    Severity::Error,
                    "column payload of outbox.events is jsonb, not json".to_owned()
                ),
                (
                    Severity::Error,
                    "outbox.events has no column content_type".to_owned()
                ),
                (
                    Severity::Warning,
                    "the default of column occurred_at of outbox.events is now()".to_owned()
                ),
            ]
        );
    }

    #[test]
    fn the_trigger_is_judged_by_the_capture_mode() {
        use CaptureMode::{Listen, Poll};
        let found = |notifies, mode| trigger(notifies, mode).map(|finding| finding.severity);
        assert_eq!(found(Some(true), Listen), None);
        assert_eq!(found(Some(false), Listen), Some(Severity::Warning));
        assert_eq!(found(None, Listen), Some(Severity::Warning));
        assert_eq!(found(Some(true), Poll), Some(Severity::Note));
        assert_eq!(found(Some(false), Poll), None);
    }
}
