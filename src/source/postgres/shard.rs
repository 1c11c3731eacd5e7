//! Which events of the log belong to one shard of a pipeline, as SQL.

use std::fmt::Write;

use anyhow::Context;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor, Row};

use crate::event::{PipelineName, Shard};
use crate::position::Snapshot;

/// The share of one shard.
pub(super) struct Share {
    /// None for a reader of everything.
    of: Option<(PipelineName, Shard)>,
    /// Where the shards stood when their number changed; none until that is known.
    former: Option<Vec<Former>>,
}

/// Where an earlier shard stood when it ended.
struct Former {
    shards: i32,
    shard: i32,
    prev: Snapshot,
    cur: Snapshot,
    last_id: i64,
}

impl Share {
    pub(super) fn everything() -> Self {
        Self {
            of: None,
            former: Some(Vec::new()),
        }
    }

    pub(super) fn new(pipeline: PipelineName, shard: Shard) -> Self {
        Self {
            of: Some((pipeline, shard)),
            former: None,
        }
    }

    pub(super) fn is_known(&self) -> bool {
        self.former.is_some()
    }

    /// What was learned may not hold in the next life.
    pub(super) fn forget(&mut self) {
        if self.of.is_some() {
            self.former = None;
        }
    }

    /// Reads where earlier shards stood.
    pub(super) async fn learn(
        &mut self,
        connection: &mut PgConnection,
    ) -> Result<(), anyhow::Error> {
        let Some((pipeline, _)) = &self.of else {
            return Ok(());
        };
        let rows = connection
            .fetch_all(sqlx::raw_sql(AssertSqlSafe(format!(
                "begin isolation level read committed read only; \
                 select shards, shard, prev::pg_catalog.text, cur::pg_catalog.text, last_id from outbox.former_cursors \
                  where pipeline operator(pg_catalog.=) '{pipeline}' order by generation, shard; commit"
            ))))
            .await
            .context("read the former cursors")?;
        let former = rows.iter().map(|row| {
            Ok(Former {
                shards: row.try_get_unchecked(0)?,
                shard: row.try_get_unchecked(1)?,
                prev: row.try_get_unchecked::<String, _>(2)?.parse()?,
                cur: row.try_get_unchecked::<String, _>(3)?.parse()?,
                last_id: row.try_get_unchecked(4)?,
            })
        });
        self.former = Some(
            former
                .collect::<Result<_, anyhow::Error>>()
                .context("decode a former cursor")?,
        );
        Ok(())
    }

    /// Empty, or `and …`: which events `e` of a window that begins at `prev` are this shard's and not an earlier one's.
    pub(super) fn condition(&self, prev: &Snapshot) -> String {
        const ENTITY: &str = "e.aggregate_type, e.aggregate_id";
        let mut sql = String::new();
        let Some((_, Shard { index, count })) = &self.of else {
            return sql;
        };
        if *count > 1 {
            // The planner takes an equality with an expression for one row in two hundred, so that it would sort whole
            // partitions rather than walk along the primary key to the limit. Of what it can't see through it expects half.
            let _ = write!(
                sql,
                "and coalesce(outbox.shard_of({ENTITY}, {count}) operator(pg_catalog.=) {index}, false)"
            );
        }
        let needed = |former: &&Former| former.cur.age() > prev.age();
        for former in self.former.iter().flatten().filter(needed) {
            let Former {
                shards,
                shard,
                prev,
                cur,
                last_id,
            } = former;
            let _ = write!(
                sql,
                " and not (outbox.shard_of({ENTITY}, {shards}) operator(pg_catalog.=) {shard} \
                    and (pg_catalog.pg_visible_in_snapshot(e.xid, '{prev}'::pg_catalog.pg_snapshot) \
                         or (pg_catalog.pg_visible_in_snapshot(e.xid, '{cur}'::pg_catalog.pg_snapshot) \
                             and e.id operator(pg_catalog.<=) {last_id})))"
            );
        }
        sql
    }
}
