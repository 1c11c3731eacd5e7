//! The rights that the migrations grant, one by one, and the statements that give and take them.

use std::collections::BTreeMap;

use crate::migrate::objects::{self, Object};
use crate::source::postgres::ask;

pub(super) const RELAY: &str = "outbox_relay";
pub(super) const WRITER: &str = "outbox_writer";

/// What the relay calls of the server, which everybody may unless an administrator or a provider took it away.
const SERVER_FUNCTIONS: [&str; 3] = [
    "pg_control_system()",
    "pg_current_wal_lsn()",
    "pg_walfile_name(pg_lsn)",
];

/// One right that the migrations grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Need {
    pub(super) role: String,
    pub(super) privilege: String,
    /// Of the table, where the right is to one.
    pub(super) column: Option<String>,
    /// With `schema`, `sequence` or `function` before the name, unless it is a table.
    pub(super) on: String,
}

impl Need {
    /// Takes `grant select (id) on outbox.events to outbox_writer` apart.
    pub(super) fn parse(right: &Object) -> Option<Self> {
        let (grant, role) = right
            .definition
            .strip_prefix("grant ")?
            .rsplit_once(" to ")?;
        let (privilege, on) = grant.split_once(" on ")?;
        let (privilege, column) = match privilege.split_once(" (") {
            Some((privilege, column)) => (privilege, column.strip_suffix(')')),
            None => (privilege, None),
        };
        Some(Self {
            role: role.to_owned(),
            privilege: privilege.to_owned(),
            column: column.map(str::to_owned),
            on: on.to_owned(),
        })
    }

    pub(super) fn all() -> Vec<Self> {
        let mut all: Vec<Self> = objects::expected().iter().filter_map(Self::parse).collect();
        all.extend(SERVER_FUNCTIONS.map(|function| Self {
            role: RELAY.to_owned(),
            privilege: "execute".to_owned(),
            column: None,
            on: format!("function {function}"),
        }));
        all
    }
}

/// Whether each right is held, by this role and by the role that it was granted to. Objects are found by name in the catalogs:
/// converting a name to an object would need the right to use the schema.
pub(super) fn held(needs: &[Need]) -> String {
    let values: Vec<String> = needs
        .iter()
        .enumerate()
        .map(|(n, need)| {
            format!(
                "({n}, {}, {}, {}, {})",
                ask::literal(&need.role),
                ask::literal(&need.privilege),
                ask::literal(need.column.as_deref().unwrap_or_default()),
                ask::literal(&need.on)
            )
        })
        .collect();
    let privilege = |of: &str| {
        format!(
            "coalesce(has_schema_privilege({of}, s.oid, n.privilege), has_function_privilege({of}, p.oid, n.privilege), \
                      case c.relkind when 'S' then has_sequence_privilege({of}, c.oid, n.privilege) end, \
                      case when n.attribute <> '' then has_column_privilege({of}, c.oid, a.attnum, n.privilege) \
                           else has_table_privilege({of}, c.oid, n.privilege) end)"
        )
    };
    format!(
        "select n.n as need, {} as held, {} as group_holds \
           from (values {}) n (n, role, privilege, attribute, object) \
           left join pg_roles g on g.rolname = n.role \
           left join pg_roles me on me.rolname = current_user \
           left join pg_namespace s on 'schema ' || quote_ident(s.nspname) = n.object \
           left join pg_proc p on n.object like 'function %' and 'function ' || p.oid::regprocedure = n.object \
           left join (pg_class c join pg_namespace cs on cs.oid = c.relnamespace and cs.nspname = 'outbox') \
             on case c.relkind when 'S' then 'sequence ' else '' end || 'outbox.' || quote_ident(c.relname) = n.object \
           left join pg_attribute a on a.attrelid = c.oid and a.attname = n.attribute and not a.attisdropped \
          where coalesce(s.oid, p.oid, c.oid) is not null and (n.attribute = '' or a.attnum is not null)",
        privilege("me.oid"),
        privilege("g.oid"),
        values.join(", ")
    )
}

pub(super) fn roles(needs: &[&Need]) -> String {
    let mut roles: Vec<&str> = needs.iter().map(|need| &*need.role).collect();
    roles.sort_unstable();
    roles.dedup();
    roles.join(", ")
}

/// Rights to columns of one table as one: `insert (a, b) on outbox.events`.
fn gathered<'n>(needs: impl IntoIterator<Item = &'n Need>) -> BTreeMap<(&'n str, String), &'n str> {
    let mut columns: BTreeMap<(&str, &str, &str), Vec<&str>> = BTreeMap::new();
    for need in needs {
        columns
            .entry((&need.role, &need.on, &need.privilege))
            .or_default()
            .extend(need.column.as_deref());
    }
    let right = |((role, on, privilege), columns): ((&'n str, &'n str, &'n str), Vec<&str>)| {
        let columns = if columns.is_empty() {
            String::new()
        } else {
            format!(" ({})", columns.join(", "))
        };
        ((role, format!("{privilege}{columns} on {on}")), role)
    };
    columns.into_iter().map(right).collect()
}

pub(super) fn list(needs: &[Need]) -> String {
    let gathered = gathered(needs);
    let rights: Vec<&str> = gathered.keys().map(|(_, right)| &**right).collect();
    rights.join(", ")
}

pub(super) fn grants(needs: &[Need]) -> Vec<String> {
    let gathered = gathered(needs);
    let grant = |((_, right), role): (&(&str, String), &&str)| format!("grant {right} to {role}");
    gathered.iter().map(grant).collect()
}

pub(super) fn revokes(needs: &[&Need]) -> Vec<String> {
    let gathered = gathered(needs.iter().copied());
    let revoke =
        |((_, right), role): (&(&str, String), &&str)| format!("revoke {right} from {role}");
    gathered.iter().map(revoke).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_right_of_the_migrations_is_understood() {
        let rights = objects::expected();
        let rights = rights
            .iter()
            .filter(|object| object.kind == "right")
            .count();
        assert!(rights > 50, "{rights}");
        assert_eq!(Need::all().len(), rights + SERVER_FUNCTIONS.len());
    }
}
