//! What the migrations make in PostgreSQL, object by object, as the catalogs describe it: so that a copy of the schema without
//! its list of migrations is recognised, and a default, a function or a right that somebody changed is found.
//!
//! The expected objects stand in `objects.txt`, which a test compares with a database that was just migrated. Every release of
//! PostgreSQL from 14 to 18 describes them with the same words.

use std::collections::BTreeSet;
use std::fmt::Write;

use anyhow::Context;
use serde::Deserialize;
use sqlx::Connection;
use sqlx::postgres::PgConnection;

use crate::source::postgres::{Connector, ask};

/// One line each: kind, name and definition, separated by tabs.
const EXPECTED: &str = include_str!("objects.txt");

/// Names stand in full where they are not of `pg_catalog`, by the path of the transaction that asks.
const PRESENT: &str = r#"
select o.kind, o.name, o.definition
  from pg_namespace s
 cross join lateral (
    select 'schema' as kind, s.nspname::text as name, '' as definition
    union all
    select case c.relkind when 'S' then 'sequence' else 'table' end,
           format('%I.%I', s.nspname, c.relname),
           concat_ws(' ', case c.relpersistence when 'u' then 'unlogged' end,
                     case c.relkind when 'p' then 'partition by ' || pg_get_partkeydef(c.oid) end,
                     (select format('%s increment %s cache %s%s', format_type(q.seqtypid, null), q.seqincrement, q.seqcache,
                                    case when q.seqcycle then ' cycle' else '' end)
                        from pg_sequence q where q.seqrelid = c.oid))
      from pg_class c
     where c.relnamespace = s.oid and c.relkind in ('r', 'p', 'S') and not c.relispartition
    union all
    select 'column', format('%I.%I.%I', s.nspname, c.relname, a.attname),
           concat_ws(' ', format_type(a.atttypid, a.atttypmod), case when a.attnotnull then 'not null' end,
                     case when a.attidentity <> '' then 'identity' end,
                     case a.attgenerated when 's' then 'generated' end,
                     'default ' || regexp_replace(trim(pg_get_expr(d.adbin, d.adrelid), chr(10) || ' '), '[[:space:]]+', ' ', 'g'))
      from pg_class c
      join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
      left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
     where c.relnamespace = s.oid and c.relkind in ('r', 'p') and not c.relispartition
    union all
    select 'constraint', format('%I.%I.%I', s.nspname, c.relname, k.conname), pg_get_constraintdef(k.oid)
      from pg_class c
      join pg_constraint k on k.conrelid = c.oid and k.contype in ('p', 'u', 'c', 'f', 'x')
     where c.relnamespace = s.oid and c.relkind in ('r', 'p') and not c.relispartition
    union all
    select 'index', format('%I.%I', s.nspname, ic.relname), pg_get_indexdef(i.indexrelid)
      from pg_class c
      join pg_index i on i.indrelid = c.oid
      join pg_class ic on ic.oid = i.indexrelid
     where c.relnamespace = s.oid and c.relkind in ('r', 'p') and not c.relispartition
       and not exists (select from pg_constraint k where k.conindid = i.indexrelid)
    union all
    select 'trigger', format('%I.%I.%I', s.nspname, c.relname, t.tgname), pg_get_triggerdef(t.oid)
      from pg_class c
      join pg_trigger t on t.tgrelid = c.oid and not t.tgisinternal
     where c.relnamespace = s.oid and c.relkind in ('r', 'p') and not c.relispartition
    union all
    select 'function', p.oid::regprocedure::text,
           concat_ws(' ', 'returns', pg_get_function_result(p.oid), l.lanname, p.provolatile::text,
                     case when p.proisstrict then 'strict' end, case when p.prosecdef then 'security definer' end,
                     array_to_string(p.proconfig, ', '),
                     'body', md5(p.prosrc || coalesce(pg_get_function_sqlbody(p.oid), '')))
      from pg_proc p
      join pg_language l on l.oid = p.prolang
     where p.pronamespace = s.oid
    union all
    select 'right', g.object,
           format('grant %s on %s to %s', lower(g.privilege_type), g.object,
                  case g.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(g.grantee)) end)
      from (
        select 'schema ' || quote_ident(s.nspname) as object, s.nspowner as owner, x.grantee, x.privilege_type
          from aclexplode(coalesce(s.nspacl, acldefault('n', s.nspowner))) x
        union all
        select case c.relkind when 'S' then 'sequence ' else '' end || format('%I.%I', s.nspname, c.relname),
               c.relowner, x.grantee, x.privilege_type
          from pg_class c
         cross join aclexplode(coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's'::"char" else 'r'::"char" end, c.relowner))) x
         where c.relnamespace = s.oid and c.relkind in ('r', 'p', 'v', 'm', 'S')
        union all
        select format('%I.%I', s.nspname, c.relname), c.relowner, x.grantee,
               format('%s (%I)', x.privilege_type, a.attname)
          from pg_class c
          join pg_attribute a on a.attrelid = c.oid and a.attacl is not null and not a.attisdropped
         cross join aclexplode(a.attacl) x
         where c.relnamespace = s.oid and c.relkind in ('r', 'p')
        union all
        select 'function ' || p.oid::regprocedure, p.proowner, x.grantee, x.privilege_type
          from pg_proc p
         cross join aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) x
         where p.pronamespace = s.oid) g
     where g.grantee <> g.owner) o
 where s.nspname = 'outbox'"#;

/// One object of the schema, or one right to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Object {
    /// `schema`, `table`, `column`, `constraint`, `index`, `sequence`, `trigger`, `function` or `right`.
    pub kind: String,
    /// In full; of a right that of the object that it is a right to.
    pub name: String,
    /// As the server writes it; of a right the statement that grants it.
    pub definition: String,
}

impl Object {
    fn is_right(&self) -> bool {
        self.kind == "right"
    }

    /// For a message: the kind and the name.
    pub(crate) fn called(&self) -> String {
        format!("{} {}", self.kind, self.name)
    }
}

/// What the migrations make.
pub(crate) fn expected() -> BTreeSet<Object> {
    EXPECTED
        .lines()
        .map(|line| {
            let mut fields = line.split('\t').map(str::to_owned);
            let mut next = || fields.next().unwrap_or_default();
            Object {
                kind: next(),
                name: next(),
                definition: next(),
            }
        })
        .collect()
}

/// What the schema `outbox` has; nothing where there is no such schema. Partitions are left out, and so are the rights of
/// owners.
pub(crate) async fn present(
    connection: &mut PgConnection,
) -> Result<BTreeSet<Object>, anyhow::Error> {
    let objects: Vec<Object> = ask::all(connection, PRESENT)
        .await
        .context("look at the objects of the schema outbox")?;
    Ok(objects.into_iter().collect())
}

/// How the tables and functions of a schema compare with those that the migrations make.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Comparison {
    /// The schema has none of them.
    Nothing,
    /// It has all of them as they are made.
    Same,
    /// It has some of them: what is missing or different.
    Different(Vec<String>),
}

/// Compares everything but the rights; what a database has besides does not matter.
pub(crate) fn compare(present: &BTreeSet<Object>) -> Comparison {
    let expected = expected();
    // The list of migrations itself says nothing: it is made together with what it lists.
    let counts = |object: &&Object| {
        !object.is_right() && object.kind != "schema" && !object.name.contains("outbox.migrations")
    };
    let lacking: Vec<&Object> = expected
        .iter()
        .filter(counts)
        .filter(|object| !present.contains(object))
        .collect();
    if lacking.is_empty() {
        return Comparison::Same;
    }
    let has_any = expected
        .iter()
        .filter(counts)
        .any(|object| present.contains(object));
    if !has_any {
        return Comparison::Nothing;
    }
    let changed = |object: &&Object| {
        let same_name = |other: &Object| other.kind == object.kind && other.name == object.name;
        match present.iter().find(|other| same_name(other)) {
            Some(other) => format!(
                "{} is {:?} instead of {:?}",
                object.called(),
                other.definition,
                object.definition
            ),
            None => format!("{} is missing", object.called()),
        }
    };
    Comparison::Different(lacking.iter().map(changed).collect())
}

/// The statements that give every right as the migrations do, and take the execution of functions from everybody else.
pub(crate) fn grants() -> String {
    let mut statements = "revoke all on all functions in schema outbox from public;\n".to_owned();
    for right in expected().iter().filter(|object| object.is_right()) {
        let _ = writeln!(statements, "{};", right.definition);
    }
    statements
}

/// The objects of a database as `objects.txt` has them, for the test that compares both.
///
/// # Errors
/// When the server can't be reached or refuses.
#[doc(hidden)]
pub async fn describe(connector: impl Into<Connector>) -> Result<String, anyhow::Error> {
    let mut connection = connector.into().connect().await?;
    let present = present(&mut connection).await?;
    connection.close().await?;
    let mut text = String::new();
    for Object {
        kind,
        name,
        definition,
    } in present
    {
        let _ = writeln!(text, "{kind}\t{name}\t{definition}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_copy_is_told_from_the_same_and_from_none() {
        let mut objects = expected();
        assert_eq!(compare(&objects), Comparison::Same);
        assert_eq!(compare(&BTreeSet::new()), Comparison::Nothing);
        let trigger = objects
            .iter()
            .find(|object| object.kind == "trigger")
            .unwrap()
            .clone();
        objects.remove(&trigger);
        let Comparison::Different(differences) = compare(&objects) else {
            panic!("a trigger is missing");
        };
        assert_eq!(
            differences,
            ["trigger outbox.events.events_notify is missing"]
        );
        objects.retain(Object::is_right);
        assert_eq!(
            compare(&objects),
            Comparison::Nothing,
            "rights do not count"
        );
    }

    #[test]
    fn every_grant_goes_to_one_of_the_two_roles() {
        for object in expected().iter().filter(|object| object.is_right()) {
            let role = object.definition.rsplit(' ').next().unwrap();
            assert!(
                ["outbox_relay", "outbox_writer"].contains(&role),
                "{object:?}"
            );
        }
    }
}
