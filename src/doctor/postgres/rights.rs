//! Looks at what the relay and the writers may do. Asks the catalogs only, so that it needs no rights itself.

use anyhow::Context;
use serde::Deserialize;
use sqlx::postgres::PgConnection;

use super::super::Finding;
use crate::source::postgres::ask;

/// Everything that the relay does, whether its role may do it, and whether `outbox_relay` may.
const RELAY: &str = "
select coalesce(json_agg(n.need) filter (where not n.held), '[]') as missing,
       coalesce(json_agg(n.need) filter (where not n.held and not coalesce(n.group_holds, false)), '[]')
           as missing_in_group,
       coalesce(bool_and(n.held) filter (where n.need like 'usage %' or n.need like 'select %'), true) as reads,
       current_user::text as role,
       coalesce(bool_or(pg_has_role(current_user, n.group_oid, 'usage')), false) as member,
       coalesce(bool_or(n.group_oid is not null), false) as group_exists
  from (
    select 'usage on schema outbox' as need, has_schema_privilege(s.oid, 'usage') as held,
           has_schema_privilege(g.oid, s.oid, 'usage') as group_holds, g.oid as group_oid
      from pg_namespace s
      left join pg_roles g on g.rolname = 'outbox_relay'
     where s.nspname = 'outbox'
    union all
    select r.privilege || ' on outbox.' || r.name, has_table_privilege(c.oid, r.privilege),
           has_table_privilege(g.oid, c.oid, r.privilege), g.oid
      from (values ('events', 'select'), ('events_id_seq', 'select'), ('migrations', 'select'),
                   ('incarnation', 'select'), ('incarnation', 'insert'),
                   ('dropped', 'select'), ('dropped', 'insert'),
                   ('cursors', 'select'), ('cursors', 'insert'), ('cursors', 'update'), ('cursors', 'delete'),
                   ('leases', 'select'), ('leases', 'insert'), ('leases', 'update'), ('leases', 'delete'),
                   ('pipelines', 'select'), ('pipelines', 'insert'), ('pipelines', 'update'),
                   ('former_cursors', 'select'), ('former_cursors', 'insert'), ('former_cursors', 'delete'),
                   ('members', 'select'), ('members', 'insert'), ('members', 'update'), ('members', 'delete'),
                   ('acts', 'select'), ('resets', 'select'), ('samples', 'select'), ('upkeep', 'select'),
                   ('replays', 'select'), ('replays', 'insert'), ('replays', 'update'),
                   ('parked', 'select'), ('parked', 'insert'), ('parked', 'update'), ('parked', 'delete'))
           r (name, privilege)
      join pg_class c on c.relname = r.name
      join pg_namespace s on s.oid = c.relnamespace and s.nspname = 'outbox'
      left join pg_roles g on g.rolname = 'outbox_relay'
    union all
    select 'insert (who, action, pipeline, selector, events, reason) on outbox.acts',
           has_any_column_privilege(c.oid, 'insert'), has_any_column_privilege(g.oid, c.oid, 'insert'), g.oid
      from pg_class c
      join pg_namespace s on s.oid = c.relnamespace and s.nspname = 'outbox'
      left join pg_roles g on g.rolname = 'outbox_relay'
     where c.relname = 'acts'
    union all
    select 'execute on function ' || p.oid::regprocedure, has_function_privilege(p.oid, 'execute'),
           has_function_privilege(g.oid, p.oid, 'execute'), g.oid
      from pg_proc p
      join pg_namespace s on s.oid = p.pronamespace
      left join pg_roles g on g.rolname = 'outbox_relay'
     where (s.nspname, p.proname) in (('outbox', 'make_partitions'), ('outbox', 'take_sample'), ('outbox', 'retire_partition'),
                                       ('outbox', 'retire_rows'), ('outbox', 'is_restored'), ('outbox', 'adopt'),
                                       ('outbox', 'repair_sequence'), ('outbox', 'shard_of'), ('pg_catalog', 'pg_control_system'))) n";

/// What writers need, and what they must not have.
const WRITERS: &str = "
select g.oid is not null as group_exists,
       (select count(*) from pg_auth_members m where m.roleid = g.oid) as members,
       coalesce((select json_agg(n.need) from (
            select 'usage on schema outbox' as need
              from pg_namespace s
             where s.nspname = 'outbox' and not has_schema_privilege(g.oid, s.oid, 'usage')
            union all
            select 'usage on sequence outbox.events_id_seq'
              from pg_class c
              join pg_namespace s on s.oid = c.relnamespace and s.nspname = 'outbox'
             where c.relname = 'events_id_seq' and not has_sequence_privilege(g.oid, c.oid, 'usage')
            union all
            select 'insert (' || string_agg(quote_ident(a.attname), ', ' order by a.attnum) || ') on outbox.events'
              from pg_attribute a
              join pg_class c on c.oid = a.attrelid and c.relname = 'events'
              join pg_namespace s on s.oid = c.relnamespace and s.nspname = 'outbox'
             where a.attname in ('event_id', 'aggregate_type', 'aggregate_id', 'event_type', 'payload', 'payload_bytes',
                                 'content_type', 'headers', 'occurred_at')
               and not has_column_privilege(g.oid, c.oid, a.attnum, 'insert')
            having count(*) > 0
            union all
            select 'execute on function ' || p.oid::regprocedure
              from pg_proc p
              join pg_namespace s on s.oid = p.pronamespace and s.nspname = 'outbox'
             where p.proname in ('emit', 'emit_bytes', 'context', 'merged_headers')
               and not has_function_privilege(g.oid, p.oid, 'execute')) n), '[]') as missing,
       coalesce((select json_agg(a.attname order by a.attnum)
          from pg_attribute a
          join pg_class c on c.oid = a.attrelid and c.relname = 'events'
          join pg_namespace s on s.oid = c.relnamespace and s.nspname = 'outbox'
         where a.attname in ('xid', 'id') and has_column_privilege(g.oid, c.oid, a.attnum, 'insert')), '[]') as may_set
  from (values (1)) one
  left join pg_roles g on g.rolname = 'outbox_writer'";

/// What the relay's role may do.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Rights {
    /// As in `grant … to`.
    missing: Vec<String>,
    /// Of those, what `outbox_relay` does not have either.
    missing_in_group: Vec<String>,
    /// Whether the log and the books can be read.
    reads: bool,
    role: String,
    /// Whether the role has the rights of `outbox_relay`.
    member: bool,
    group_exists: bool,
}

#[derive(Clone, Debug, Deserialize)]
struct Writers {
    group_exists: bool,
    members: i64,
    missing: Vec<String>,
    may_set: Vec<String>,
}

pub(super) async fn examine(connection: &mut PgConnection) -> Result<Rights, anyhow::Error> {
    ask::one(connection, RELAY)
        .await
        .context("ask about the relay's rights")
}

pub(super) async fn writers(connection: &mut PgConnection) -> Result<Vec<Finding>, anyhow::Error> {
    let writers: Writers = ask::one(connection, WRITERS)
        .await
        .context("ask about the writers' rights")?;
    Ok(writers.judge())
}

impl Rights {
    /// Whether it is worth asking what needs these rights.
    pub(super) fn suffice_to_read(&self) -> bool {
        self.reads
    }

    pub(super) fn judge(self) -> Vec<Finding> {
        let Self {
            missing,
            missing_in_group,
            reads: _,
            role,
            member,
            group_exists,
        } = self;
        if missing.is_empty() {
            return Vec::new();
        }
        let mut mend = Vec::new();
        if !group_exists {
            mend.push("create role outbox_relay nologin".to_owned());
        }
        mend.extend(
            missing_in_group
                .iter()
                .map(|need| format!("grant {need} to outbox_relay")),
        );
        if !member {
            mend.push(format!("grant outbox_relay to {}", ask::identifier(&role)));
        }
        vec![
            Finding::error(
                "rights",
                format!("the role {role} lacks: {}", missing.join(", ")),
                "the relay does these things, and is refused",
            )
            .sql(mend.join("; ")),
        ]
    }
}

impl Writers {
    fn judge(self) -> Vec<Finding> {
        let Self {
            group_exists,
            members,
            missing,
            may_set,
        } = self;
        let nobody = "only the owner of the tables and superusers can emit events";
        if !group_exists {
            return vec![
                Finding::note("writers", "there is no role outbox_writer", nobody)
                    .sql("create role outbox_writer nologin; grant outbox_writer to my_service"),
            ];
        }
        let mut findings = Vec::new();
        if !may_set.is_empty() {
            let columns = may_set.join(", ");
            findings.push(
                Finding::warning(
                    "writers_order",
                    format!("writers may set {columns} of outbox.events themselves"),
                    "an event with an id or xid of its own may lie where the relay has been already, and never be published",
                )
                .sql(format!(
                    // A right to the whole table covers its columns, so it has to go first.
                    "revoke insert on outbox.events from outbox_writer; \
                     revoke insert ({columns}) on outbox.events from outbox_writer; \
                     grant insert (event_id, aggregate_type, aggregate_id, event_type, payload, payload_bytes, \
                     content_type, headers, occurred_at) on outbox.events to outbox_writer"
                )),
            );
        }
        if !missing.is_empty() {
            let grants: Vec<String> = missing
                .iter()
                .map(|need| format!("grant {need} to outbox_writer"))
                .collect();
            findings.push(
                Finding::warning(
                    "writers_rights",
                    format!("outbox_writer lacks: {}", missing.join(", ")),
                    "services that are members of it can't emit events",
                )
                .sql(grants.join("; ")),
            );
        }
        if members == 0 {
            findings.push(
                Finding::note("writers", "no role is a member of outbox_writer", nobody).sql(
                    "grant outbox_writer to my_service   -- the role that the service connects as",
                ),
            );
        }
        findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Remedy;

    #[test]
    fn a_right_is_given_where_it_is_missing() {
        let remedy = |missing_in_group: &[&str], member| {
            let rights = Rights {
                missing: vec!["select on outbox.events".to_owned()],
                missing_in_group: missing_in_group.iter().map(|&s| s.to_owned()).collect(),
                reads: false,
                role: "shop".to_owned(),
                member,
                group_exists: true,
            };
            match rights.judge().remove(0).remedy {
                Some(Remedy::Sql(sql)) => sql,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(remedy(&[], false), "grant outbox_relay to \"shop\"");
        assert_eq!(
            remedy(&["select on outbox.events"], true),
            "grant select on outbox.events to outbox_relay"
        );
    }
}
