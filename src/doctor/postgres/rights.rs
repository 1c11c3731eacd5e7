//! Looks at what the relay, the writers and everybody else may do, against what the migrations grant.
//!
//! The list of rights is that of the migrations, so that no right can be forgotten here. Asks the catalogs only, so that it needs
//! no rights itself.

use std::collections::BTreeSet;

use anyhow::Context;
use serde::Deserialize;
use sqlx::postgres::PgConnection;

use super::super::Finding;
use super::need::{Need, RELAY, WRITER, grants, held, list, revokes, roles};
use crate::migrate::objects::{self, Object};
use crate::source::postgres::ask;

/// About the two roles and the owners.
const ROLES: &str = "
select current_user::text as me,
       current_setting('server_version_num')::int >= 160000 as grants_inherit,
       (select coalesce(json_agg(rolname), '[]') from pg_roles where rolname in ('outbox_relay', 'outbox_writer')) as groups,
       coalesce((select case when pg_has_role(current_user, oid, 'usage') then 'inherits'
                             when pg_has_role(current_user, oid, 'member') then 'has_nothing' end
                   from pg_roles where rolname = 'outbox_relay'), 'none') as membership,
       (select count(*) from pg_auth_members m join pg_roles g on g.oid = m.roleid and g.rolname = 'outbox_writer')
           as writers,
       (select coalesce(json_agg(u.rolname order by u.rolname), '[]')
          from pg_roles u, pg_roles g
         where g.rolname = 'outbox_writer' and u.rolcanlogin and not u.rolsuper
           and pg_has_role(u.oid, g.oid, 'member') and not pg_has_role(u.oid, g.oid, 'usage')) as writers_without,
       (select coalesce(json_agg(distinct d.datname), '[]')
          from pg_shdepend x
          join pg_roles g on g.oid = x.refobjid and g.rolname in ('outbox_writer', 'outbox_relay')
          join pg_database d on d.oid = x.dbid and d.datname <> current_database()
         where x.refclassid = 'pg_authid'::regclass) as other_databases,
       so.rolname::text as schema_owner, eo.rolname::text as table_owner, coalesce(so.rolsuper, false) as schema_of_superuser
  from pg_namespace s
  join pg_roles so on so.oid = s.nspowner
  left join pg_class e on e.relnamespace = s.oid and e.relname = 'events'
  left join pg_roles eo on eo.oid = e.relowner
 where s.nspname = 'outbox'";

#[derive(Clone, Debug, Deserialize)]
struct Answer {
    need: usize,
    held: Option<bool>,
    group_holds: Option<bool>,
}

/// Of the relay's own role in `outbox_relay`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Membership {
    #[default]
    None,
    /// A member without its rights.
    HasNothing,
    Inherits,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Roles {
    me: String,
    /// Since PostgreSQL 16 a membership says itself whether it inherits.
    grants_inherit: bool,
    /// Which of the two roles there are.
    groups: Vec<String>,
    membership: Membership,
    writers: i64,
    /// Roles that are members and have none of the rights.
    writers_without: Vec<String>,
    other_databases: Vec<String>,
    schema_owner: String,
    table_owner: Option<String>,
    schema_of_superuser: bool,
}

/// What the roles may do.
#[derive(Clone, Debug)]
pub(super) struct Rights {
    roles: Roles,
    /// What this role lacks of the relay's rights.
    missing: Vec<Need>,
    /// Of those, what the relay's group lacks itself.
    missing_in_group: Vec<Need>,
    /// What writers lack.
    missing_for_writers: Vec<Need>,
    /// What somebody has and the migrations do not give.
    excess: Vec<Need>,
    /// Functions that differ from those of the migrations, or are none of them.
    foreign: Vec<String>,
}

pub(super) async fn examine(connection: &mut PgConnection) -> Result<Rights, anyhow::Error> {
    let roles = ask::one(connection, ROLES)
        .await
        .context("ask about the roles")?;
    let needs = Need::all();
    let found: Vec<Answer> = ask::all(connection, &held(&needs))
        .await
        .context("ask about the rights")?;
    let lacking = |role: &str, holds: fn(&Answer) -> Option<bool>| -> Vec<Need> {
        let of_role = found
            .iter()
            .map(|answer| (&needs[answer.need], holds(answer) == Some(true)));
        of_role
            .filter(|(need, holds)| need.role == role && !holds)
            .map(|(need, _)| need.clone())
            .collect()
    };
    let missing = lacking(RELAY, |answer| answer.held);
    let missing_in_group = lacking(RELAY, |answer| answer.group_holds)
        .into_iter()
        .filter(|need| missing.contains(need))
        .collect();
    let present = objects::present(connection).await?;
    Ok(Rights {
        missing_for_writers: lacking(WRITER, |answer| answer.group_holds),
        missing,
        missing_in_group,
        roles,
        excess: excess(present.iter().filter_map(Need::parse).collect(), &needs),
        foreign: foreign(present),
    })
}

/// Grants that the migrations do not make: all to the two roles and to everybody, and to others those that change something.
fn excess(granted: Vec<Need>, needs: &[Need]) -> Vec<Need> {
    granted
        .into_iter()
        .filter(|right| {
            let harmless = ["select", "usage", "references"].contains(&&*right.privilege);
            match &*right.role {
                RELAY | WRITER => !needs.contains(right),
                "public" => true,
                _ => {
                    let as_of = |role: &str| Need {
                        role: role.to_owned(),
                        ..right.clone()
                    };
                    !harmless && !needs.contains(&as_of(WRITER)) && !needs.contains(&as_of(RELAY))
                }
            }
        })
        .collect()
}

/// Defaults are judged with the columns; what users add to the tables is theirs.
fn foreign(present: BTreeSet<Object>) -> Vec<String> {
    let expected = objects::expected();
    let mut foreign: Vec<String> = present
        .into_iter()
        .filter(|object| object.kind == "function" && !expected.contains(object))
        .map(|object| object.name)
        .collect();
    foreign.sort();
    foreign
}

impl Rights {
    /// Whether it is worth asking what needs these rights.
    pub(super) fn suffice_to_read(&self) -> bool {
        !self
            .missing
            .iter()
            .any(|need| ["usage", "select"].contains(&&*need.privilege))
    }

    pub(super) fn judge(self) -> Vec<Finding> {
        let mut findings = Vec::new();
        findings.extend(self.of_relay());
        findings.extend(self.of_writers());
        findings.extend(self.too_many());
        findings.extend(self.not_ours());
        findings
    }

    fn of_relay(&self) -> Option<Finding> {
        if self.missing.is_empty() {
            return None;
        }
        let Roles {
            me,
            grants_inherit,
            groups,
            membership,
            ..
        } = &self.roles;
        let me = ask::identifier(me);
        let mut mend = Vec::new();
        if !groups.iter().any(|group| group == RELAY) {
            mend.push(format!("create role {RELAY} nologin"));
        }
        mend.extend(grants(&self.missing_in_group));
        let lacks = match membership {
            Membership::Inherits => format!("lacks: {}", list(&self.missing)),
            Membership::HasNothing => {
                mend.push(inherit(RELAY, &me, *grants_inherit));
                format!("is a member of {RELAY} and does not inherit its rights")
            }
            Membership::None => {
                mend.push(format!("grant {RELAY} to {me}"));
                let lacks = list(&self.missing_in_group);
                if lacks.is_empty() {
                    format!("is no member of {RELAY}, and lacks its rights")
                } else {
                    format!("is no member of {RELAY}, which lacks: {lacks}")
                }
            }
        };
        Some(
            Finding::error(
                "rights",
                format!("the role {} {lacks}", self.roles.me),
                "the database refuses what the relay does",
            )
            .sql(mend.join("; ")),
        )
    }

    fn of_writers(&self) -> Vec<Finding> {
        let Roles {
            grants_inherit,
            groups,
            writers,
            writers_without,
            ..
        } = &self.roles;
        let nobody = "only the owner of the tables and superusers can emit events";
        if !groups.iter().any(|group| group == WRITER) {
            return vec![
                Finding::note("writers", format!("there is no role {WRITER}"), nobody).sql(
                    format!("create role {WRITER} nologin; grant {WRITER} to my_service"),
                ),
            ];
        }
        let mut findings = Vec::new();
        if !self.missing_for_writers.is_empty() {
            findings.push(
                Finding::warning(
                    "writers_rights",
                    format!("{WRITER} lacks: {}", list(&self.missing_for_writers)),
                    "services that are members of it can't emit events",
                )
                .sql(grants(&self.missing_for_writers).join("; ")),
            );
        }
        if !writers_without.is_empty() {
            let mend = writers_without
                .iter()
                .map(|role| inherit(WRITER, &ask::identifier(role), *grants_inherit));
            findings.push(
                Finding::warning(
                    "writers_inherit",
                    format!(
                        "members of {WRITER} that do not inherit its rights: {}",
                        writers_without.join(", ")
                    ),
                    "they can't emit events unless they set the role first",
                )
                .sql(mend.collect::<Vec<_>>().join("; ")),
            );
        }
        if *writers == 0 {
            findings.push(
                Finding::note(
                    "writers",
                    format!("no role is a member of {WRITER}"),
                    nobody,
                )
                .sql(format!(
                    "grant {WRITER} to my_service   -- the role that the service connects as"
                )),
            );
        }
        findings
    }

    fn too_many(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        let of_order = |need: &&Need| {
            need.on == "outbox.events"
                && need.privilege == "insert"
                && need
                    .column
                    .as_deref()
                    .is_none_or(|column| ["id", "xid"].contains(&column))
        };
        let (order, others): (Vec<&Need>, Vec<&Need>) = self.excess.iter().partition(of_order);
        if !order.is_empty() {
            findings.push(
                Finding::warning(
                    "writers_order",
                    format!("{} may set id or xid of outbox.events", roles(&order)),
                    "an event with an id or xid of its own may lie where the relay has been already, and never be published",
                )
                .sql(taken_back(&order)),
            );
        }
        if !others.is_empty() {
            let rights: Vec<Need> = others.iter().map(|need| (*need).clone()).collect();
            findings.push(
                Finding::warning(
                    "excess_rights",
                    format!(
                        "{} may do more than they need: {}",
                        roles(&others),
                        list(&rights)
                    ),
                    "whoever has these rights can lose, forge or hide events",
                )
                .sql(taken_back(&others)),
            );
        }
        findings
    }

    fn not_ours(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        let Roles {
            other_databases,
            schema_owner,
            table_owner,
            schema_of_superuser,
            ..
        } = &self.roles;
        if !self.foreign.is_empty() {
            findings.push(
                Finding::error(
                    "objects",
                    format!(
                        "functions of the schema outbox that are not as the migrations make them: {}",
                        self.foreign.join(", ")
                    ),
                    "the relay and the writers call functions of this schema with their own rights",
                )
                .advice(
                    "compare them with `outbox-relay migrate --print`: make them anew from there, or drop what is not in it",
                ),
            );
        }
        if let Some(owner) = table_owner
            && owner != schema_owner
            && !schema_of_superuser
        {
            findings.push(
                Finding::warning(
                    "owner",
                    format!("the schema outbox belongs to {schema_owner}, its tables to {owner}"),
                    format!("{schema_owner} may drop whatever is in the schema"),
                )
                .sql(format!(
                    "alter schema outbox owner to {}",
                    ask::identifier(owner)
                )),
            );
        }
        if !other_databases.is_empty() {
            const NAMED: usize = 3;
            let named = &other_databases[..other_databases.len().min(NAMED)];
            let more = match other_databases.len() - named.len() {
                0 => String::new(),
                more => format!(", and {more} more"),
            };
            findings.push(Finding::note(
                "roles",
                format!(
                    "the roles {WRITER} and {RELAY} also have rights in other databases of this server: {}{more}",
                    named.join(", ")
                ),
                "roles belong to the whole server: who may emit here may emit there, where the role may connect",
            ));
        }
        findings
    }
}

/// The statement after which a member has the rights of the group.
fn inherit(group: &str, member: &str, grants_inherit: bool) -> String {
    if grants_inherit {
        format!("grant {group} to {member} with inherit true")
    } else {
        format!("alter role {member} inherit")
    }
}

/// Revokes rights. A right to a whole table takes those to its columns along, which are granted anew then.
fn taken_back(excess: &[&Need]) -> String {
    let taken_along = |need: &Need| {
        need.column.is_some()
            && excess.iter().any(|right| {
                right.column.is_none()
                    && (&right.role, &right.privilege, &right.on)
                        == (&need.role, &need.privilege, &need.on)
            })
    };
    let again: Vec<Need> = Need::all().into_iter().filter(taken_along).collect();
    let mut statements = revokes(excess);
    statements.extend(grants(&again));
    statements.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Remedy;

    fn need(privilege: &str, column: Option<&str>, on: &str, role: &str) -> Need {
        Need {
            role: role.to_owned(),
            privilege: privilege.to_owned(),
            column: column.map(str::to_owned),
            on: on.to_owned(),
        }
    }

    fn rights(missing_in_group: &[Need], membership: Membership) -> Rights {
        Rights {
            roles: Roles {
                me: "shop".to_owned(),
                groups: vec![RELAY.to_owned(), WRITER.to_owned()],
                writers: 1,
                membership,
                grants_inherit: true,
                ..Roles::default()
            },
            missing: vec![need("select", None, "outbox.events", RELAY)],
            missing_in_group: missing_in_group.to_vec(),
            missing_for_writers: Vec::new(),
            excess: Vec::new(),
            foreign: Vec::new(),
        }
    }

    #[test]
    fn a_right_is_given_where_it_is_missing() {
        let remedy = |missing_in_group: &[Need], membership| {
            let rights = rights(missing_in_group, membership);
            match rights.judge().remove(0).remedy {
                Some(Remedy::Sql(sql)) => sql,
                other => panic!("{other:?}"),
            }
        };
        let select = need("select", None, "outbox.events", RELAY);
        assert_eq!(
            remedy(&[], Membership::None),
            "grant outbox_relay to \"shop\""
        );
        assert_eq!(
            remedy(&[], Membership::HasNothing),
            "grant outbox_relay to \"shop\" with inherit true"
        );
        assert_eq!(
            remedy(&[select], Membership::Inherits),
            "grant select on outbox.events to outbox_relay"
        );
    }

    #[test]
    fn what_others_may_read_is_their_own_business() {
        let needs = Need::all();
        let granted = vec![
            need("select", None, "outbox.events", "analyst"),
            need("insert", Some("payload"), "outbox.events", "shop"),
            need("insert", None, "outbox.events", "shop"),
            need("select", None, "outbox.events", WRITER),
            need("execute", None, "function outbox.adopt()", "public"),
            need("select", None, "outbox.events", RELAY),
        ];
        let found = excess(granted.clone(), &needs);
        assert_eq!(found, granted[2..5]);
    }
}
