//! Which shards each of the relays that are there should own. Pure: no I/O, clock or logging.
//!
//! All of them look at the same tables and come to the same conclusion. Where they differ for a moment, because one looked
//! earlier, the leases keep them apart, and the next look ends it: a fair distribution is left as it is.

use crate::ledger::postgres::roster::Crew;
use crate::relay::turn::Turn;

/// What one relay is to do about a pipeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// For each shard whether this relay may own it.
    pub turns: Vec<Turn>,
    /// Every shard is given back, and everybody wants this number of them.
    pub reshard: Option<u32>,
}

/// The plan of the relay `me`. `overdue` says of each shard whether nobody has owned it for so long that whoever should
/// take it seems unable to.
///
/// While everybody who is there wants another number of shards, all of them are given back. One whose last owner could not
/// settle it (it died) is owned once more for that: only then is its cursor known to be exact.
#[must_use]
pub fn plan(me: &str, crew: &Crew, overdue: &[bool]) -> Plan {
    let owners: Vec<Option<&str>> = crew
        .leases
        .iter()
        .map(|lease| lease.holder.as_deref())
        .collect();
    let members = everybody(me, crew);
    let should = spread(&members, &owners);
    let wanted = wanted(crew).filter(|wanted| *wanted != crew.shards);
    let turn = |shard: usize| {
        let lease = &crew.leases[shard];
        let assigned = members[should[shard]] == me;
        let free = lease.holder.is_none();
        let ours = match wanted {
            Some(_) => assigned && free && !lease.settled,
            None => assigned || (free && overdue.get(shard).copied().unwrap_or_default()),
        };
        if ours {
            return Turn::Ours;
        }
        let other = lease.holder.as_deref().filter(|holder| *holder != me);
        Turn::Theirs {
            holder: match wanted {
                Some(wanted) => format!("none: the number of shards is about to become {wanted}"),
                None => other.unwrap_or(members[should[shard]]).to_owned(),
            },
        }
    };
    let all_settled = crew
        .leases
        .iter()
        .all(|lease| lease.holder.is_none() && lease.settled);
    Plan {
        turns: (0..crew.leases.len()).map(turn).collect(),
        reshard: wanted.filter(|_| all_settled),
    }
}

/// The number that all members want, if it is one.
fn wanted(crew: &Crew) -> Option<u32> {
    let mut wanted = crew.members.iter().map(|member| member.shards);
    let first = wanted.next()?;
    wanted.all(|other| other == first).then_some(first)
}

/// The members in the order in which they came, whoever owns something without being one of them, and `me`.
fn everybody<'a>(me: &'a str, crew: &'a Crew) -> Vec<&'a str> {
    let members = crew.members.iter().map(|member| &member.holder[..]);
    let owners = crew
        .leases
        .iter()
        .filter_map(|lease| lease.holder.as_deref());
    let mut everybody: Vec<&str> = Vec::new();
    for name in members.chain(owners).chain([me]) {
        if !everybody.contains(&name) {
            everybody.push(name);
        }
    }
    everybody
}

/// For each shard the index of the member who should own it: no two members differ by more than one shard, and as few
/// shards as possible change hands.
///
/// # Panics
/// When there are shards and no members.
#[must_use]
pub fn spread(members: &[&str], owners: &[Option<&str>]) -> Vec<usize> {
    let index_of = |owner: Option<&str>| members.iter().position(|member| Some(*member) == owner);
    let owners: Vec<Option<usize>> = owners.iter().map(|owner| index_of(*owner)).collect();
    let (share, more) = (owners.len() / members.len(), owners.len() % members.len());
    let mut by_held: Vec<usize> = (0..members.len()).collect();
    let held = |member: usize| {
        owners
            .iter()
            .filter(|owner| **owner == Some(member))
            .count()
    };
    by_held.sort_by_key(|member| std::cmp::Reverse(held(*member)));
    // Those who have most keep one more, where it does not come out even.
    let mut room = vec![share; members.len()];
    for member in &by_held[..more] {
        room[*member] += 1;
    }
    let mut take = |member: usize| {
        let has_room = room[member] > 0;
        room[member] -= usize::from(has_room);
        has_room
    };
    let kept: Vec<Option<usize>> = owners
        .iter()
        .map(|owner| owner.filter(|owner| take(*owner)))
        .collect();
    kept.into_iter()
        .map(|kept| {
            kept.or_else(|| (0..members.len()).find(|member| take(*member)))
                .expect("there is room for every shard")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::postgres::roster::{Lease, Member};

    fn crew(members: &[(&str, u32)], leases: &[(Option<&str>, bool)]) -> Crew {
        Crew {
            pipeline: "main".to_owned(),
            shards: u32::try_from(leases.len()).unwrap(),
            members: members
                .iter()
                .map(|(holder, shards)| Member {
                    holder: (*holder).to_owned(),
                    shards: *shards,
                })
                .collect(),
            leases: leases
                .iter()
                .map(|(holder, settled)| Lease {
                    holder: holder.map(str::to_owned),
                    settled: *settled,
                })
                .collect(),
        }
    }

    fn ours(plan: &Plan) -> Vec<usize> {
        let turns = plan.turns.iter().enumerate();
        turns
            .filter(|(_, turn)| **turn == Turn::Ours)
            .map(|(shard, _)| shard)
            .collect()
    }

    #[test]
    fn whoever_comes_gets_a_share_and_whoever_goes_leaves_it() {
        let alone = crew(&[("a", 4)], &[(Some("a"), false); 4]);
        assert_eq!(ours(&plan("a", &alone, &[])), [0, 1, 2, 3]);
        let joined = crew(&[("a", 4), ("b", 4)], &[(Some("a"), false); 4]);
        assert_eq!(ours(&plan("a", &joined, &[])), [0, 1]);
        assert_eq!(ours(&plan("b", &joined, &[])), [2, 3]);
        let gone = [
            (Some("a"), false),
            (Some("a"), false),
            (None, true),
            (None, false),
        ];
        assert_eq!(
            ours(&plan("a", &crew(&[("a", 4)], &gone), &[])),
            [0, 1, 2, 3]
        );
    }

    #[test]
    fn a_shard_that_nobody_takes_is_anybodys() {
        let stuck = crew(&[("a", 1), ("b", 1)], &[(None, false)]);
        assert_eq!(ours(&plan("a", &stuck, &[false])), [0]);
        assert_eq!(ours(&plan("b", &stuck, &[false])), [0; 0]);
        assert_eq!(ours(&plan("b", &stuck, &[true])), [0]);
        let owned = crew(&[("a", 1), ("b", 1)], &[(Some("a"), false)]);
        assert_eq!(ours(&plan("b", &owned, &[true])), [0; 0]);
        let Turn::Theirs { holder } = &plan("b", &owned, &[]).turns[0] else {
            panic!("it is a's");
        };
        assert_eq!(holder, "a");
    }

    #[test]
    fn an_owner_who_is_not_registered_counts() {
        let older = crew(&[("b", 2)], &[(Some("a"), false), (None, false)]);
        assert_eq!(ours(&plan("b", &older, &[])), [1]);
    }

    #[test]
    fn the_number_changes_once_everybody_wants_it_and_everything_is_settled() {
        let owned = [(Some("a"), false), (Some("b"), false)];
        let rolling = crew(&[("a", 2), ("b", 3)], &owned);
        assert_eq!(plan("a", &rolling, &[]).reshard, None);
        assert_eq!(ours(&plan("a", &rolling, &[])), [0]);
        let all = [("a", 3), ("b", 3)];
        for me in ["a", "b"] {
            let giving_up = plan(me, &crew(&all, &owned), &[]);
            assert_eq!((ours(&giving_up), giving_up.reshard), (vec![], None));
            let settled = plan(me, &crew(&all, &[(None, true); 2]), &[true; 2]);
            assert_eq!((ours(&settled), settled.reshard), (vec![], Some(3)));
        }
        // The owner of the second one died.
        let died = crew(&all, &[(None, true), (None, false)]);
        assert_eq!(plan("a", &died, &[true; 2]).reshard, None);
        let takers = ["a", "b"].map(|me| ours(&plan(me, &died, &[true; 2])));
        assert_eq!(takers.concat(), [1]);
    }

    proptest! {
        #[test]
        fn shards_are_spread_evenly_and_stay_where_they_can(
            members in 1_usize..8,
            owners in prop::collection::vec(prop::option::of(0_usize..10), 1..40),
        ) {
            let names: Vec<String> = (0..10).map(|n| format!("relay {n}")).collect();
            let there: Vec<&str> = names[..members].iter().map(String::as_str).collect();
            let owned: Vec<Option<&str>> = owners.iter().map(|owner| owner.map(|n| &names[n][..])).collect();
            let should = spread(&there, &owned);
            let count = |of: &dyn Fn(usize) -> bool| (0..owners.len()).filter(|shard| of(*shard)).count();
            let share = owners.len() / members;
            let mut needless = 0;
            for member in 0..members {
                let gets = count(&|shard| should[shard] == member);
                prop_assert!(gets == share || gets == share + 1, "{member} gets {gets}");
                let had = count(&|shard| owners[shard] == Some(member));
                let kept = count(&|shard| owners[shard] == Some(member) && should[shard] == member);
                prop_assert!(kept == had.min(gets), "{member} had {had}, gets {gets} and kept {kept}");
                needless += had - kept;
            }
            // What has to change hands whatever the distribution: all that is above the higher share, or above the lower one
            // once as many as possible have the higher.
            let mut most = vec![share + 1; owners.len() % members];
            most.resize(members, share);
            let mut had: Vec<usize> = (0..members).map(|m| count(&|shard| owners[shard] == Some(m))).collect();
            had.sort_unstable_by(|a, b| b.cmp(a));
            let least: usize = had.iter().zip(&most).map(|(had, most)| had.saturating_sub(*most)).sum();
            prop_assert_eq!(needless, least);
            let again: Vec<Option<&str>> = should.iter().map(|member| Some(there[*member])).collect();
            prop_assert_eq!(spread(&there, &again), should, "it comes to rest");
        }
    }
}
