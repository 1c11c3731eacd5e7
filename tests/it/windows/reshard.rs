//! The number of shards changes while writers write: nothing is lost, repeated or out of order.

use std::collections::HashMap;
use std::time::Duration;

use outbox_relay::event::{Event, Payload, Shard};
use outbox_relay::ledger::postgres::roster::Roster;
use outbox_relay::ledger::{Acquired, Fenced, Ledger};
use outbox_relay::position::Position;
use outbox_relay::source::{PageLimits, Source};
use sqlx::postgres::PgConnection;

use super::database::{Database, ask, number, sql, with_database};
use super::writers::Random;

const ENTITIES: u64 = 12;

fn roster(database: &Database, holder: &str, shards: u32) -> Roster {
    Roster::new(
        database.options.clone(),
        holder.to_owned(),
        Duration::from_secs(60),
        vec![("orders".parse().expect("a name"), shards)],
    )
}

/// Changes the number of shards, as the relay that is the only one.
async fn reshard(database: &Database, shards: u32) {
    let name = "orders".parse().expect("a name");
    let mut roster = roster(database, "the only one", shards);
    let seen = roster.look(true).await.expect("look");
    if seen[0].shards != shards {
        assert!(roster.reshard(&name, shards).await.expect("reshard"));
    }
    assert_eq!(roster.look(false).await.expect("look")[0].shards, shards);
}

/// What was delivered of each entity, in order.
#[derive(Default)]
struct Delivered(HashMap<String, Vec<u64>>);

impl Delivered {
    fn add(&mut self, event: &Event) {
        let Payload::Json(json) = &event.payload else {
            panic!("a number")
        };
        let n: u64 = serde_json::from_slice(json).expect("a number");
        self.0
            .entry(event.aggregate_id.to_string())
            .or_default()
            .push(n);
    }

    fn events(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }
}

/// One shard, for some pages or until there is nothing more; stops anywhere inside of a page.
async fn work(
    database: &Database,
    shard: Shard,
    pages: Option<u64>,
    random: &mut Random,
    delivered: &mut Delivered,
) {
    let (mut source, mut ledger) = database.shard(shard, "the only one");
    let Acquired::Ours(tenure) = ledger.acquire().await.expect("acquire") else {
        panic!("nobody else is here");
    };
    source.seek(tenure.position.clone());
    let mut durable = tenure.position;
    let mut left = pages;
    while left != Some(0) {
        left = left.map(|left| left - 1);
        let limits = PageLimits {
            rows: 1 + usize::try_from(random.below(20)).expect("small"),
            bytes: 1_000_000,
        };
        let page = source.capture(limits, &durable).await.expect("capture");
        let is_last = page.events.is_empty() && !page.more;
        let mut end = page.end.clone();
        let mut taken = page.events.len();
        if left == Some(0) && !page.events.is_empty() {
            taken = 1 + usize::try_from(random.below(page.events.len() as u64)).expect("small");
            if taken < page.events.len() {
                end = Position {
                    window: page.end.window.clone(),
                    last_id: page.events[taken - 1].id,
                };
            }
        }
        for event in &page.events[..taken] {
            delivered.add(event);
        }
        assert_eq!(
            ledger.acknowledge(&end).await.expect("acknowledge"),
            Fenced::Written
        );
        durable = end;
        if is_last {
            break;
        }
    }
    ledger.release(true).await.expect("release");
}

/// Writers of which each changes an entity that nobody else has in hand, in transactions that stay open for some rounds.
struct Writers {
    open: Vec<(PgConnection, Vec<u64>)>,
    counters: Vec<u64>,
}

impl Writers {
    async fn round(&mut self, database: &Database, random: &mut Random) {
        for _ in 0..random.below(12) {
            let entity = random.below(ENTITIES);
            let holder = self
                .open
                .iter()
                .position(|(_, entities)| entities.contains(&entity));
            let holder = match holder {
                Some(holder) => holder,
                None if self.open.is_empty() || (self.open.len() < 6 && random.below(2) == 0) => {
                    let mut connection = database.connect().await;
                    sql(&mut connection, "begin").await;
                    self.open.push((connection, Vec::new()));
                    self.open.len() - 1
                }
                None => usize::try_from(random.below(self.open.len() as u64)).expect("small"),
            };
            let (connection, entities) = &mut self.open[holder];
            if !entities.contains(&entity) {
                entities.push(entity);
            }
            let counter = &mut self.counters[usize::try_from(entity).expect("small")];
            *counter += 1;
            let emit = format!("select outbox.emit('thing', '{entity}', 'changed', '{counter}')");
            sql(connection, &emit).await;
        }
        let mut kept = Vec::new();
        for (mut connection, entities) in self.open.drain(..) {
            if random.below(3) == 0 {
                sql(&mut connection, "commit").await;
            } else {
                kept.push((connection, entities));
            }
        }
        self.open = kept;
    }
}

#[tokio::test]
async fn every_event_comes_once_and_in_order_whatever_becomes_of_the_shards() {
    let seed = number("RESHARD_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("RESHARD_SEED={seed}");
    with_database("reshard", async |database| {
        let mut random = Random::new(seed);
        let mut writers = Writers {
            open: Vec::new(),
            counters: vec![0; usize::try_from(ENTITIES).expect("small")],
        };
        let mut delivered = Delivered::default();
        let (mut shards, mut former) = (1, 0);
        reshard(database, shards).await;
        for _ in 0..40 {
            writers.round(database, &mut random).await;
            // Every shard has to be settled once, some of them far ahead of others.
            for index in 0..shards {
                let shard = Shard {
                    index,
                    count: shards,
                };
                let pages = random.below(4);
                work(database, shard, Some(pages), &mut random, &mut delivered).await;
                if random.below(3) == 0 {
                    writers.round(database, &mut random).await;
                }
            }
            shards = 1 + u32::try_from(random.below(5)).expect("small");
            reshard(database, shards).await;
            let mut connection = database.connect().await;
            let kept = ask(
                &mut connection,
                "select count(*)::text from outbox.former_cursors",
            )
            .await;
            former = former.max(kept.parse().expect("a number"));
        }
        for (connection, _) in &mut writers.open {
            sql(connection, "commit").await;
        }
        // A second time: the window after the one in which everything came.
        for index in (0..shards).chain(0..shards) {
            let shard = Shard {
                index,
                count: shards,
            };
            work(database, shard, None, &mut random, &mut delivered).await;
        }
        println!(
            "{} events, {former} former cursors at most",
            delivered.events()
        );
        assert!(
            former > 0,
            "the case is shards that stood at different places"
        );
        for (entity, emitted) in writers.counters.iter().enumerate() {
            let got = delivered.0.remove(&entity.to_string()).unwrap_or_default();
            assert_eq!(got, (1..=*emitted).collect::<Vec<u64>>(), "entity {entity}");
        }
        assert!(delivered.0.is_empty());
        // Forgotten once nothing needs them any more.
        reshard(database, shards % 5 + 1).await;
        let mut connection = database.connect().await;
        let generations = "select count(distinct generation)::text from outbox.former_cursors";
        assert!(
            ask(&mut connection, generations)
                .await
                .parse::<u32>()
                .expect("a number")
                <= 1
        );
    })
    .await;
}

#[tokio::test]
async fn a_number_changes_only_when_everybody_wants_it_and_nothing_is_owned_or_unsettled() {
    with_database("reshard_waits", async |database| {
        let name = "orders".parse().expect("a name");
        reshard(database, 2).await;
        let shard = |index, count| Shard { index, count };
        let mut relays = Vec::new();
        for index in 0..2 {
            let (_, mut ledger) = database.shard(shard(index, 2), "the only one");
            assert!(matches!(
                ledger.acquire().await.expect("acquire"),
                Acquired::Ours(_)
            ));
            relays.push(ledger);
        }
        // Of another number there are no shards.
        let (_, mut stranger) = database.shard(shard(0, 3), "a stranger");
        assert!(!matches!(
            stranger.acquire().await.expect("acquire"),
            Acquired::Ours(_)
        ));
        let mut wanting = roster(database, "the only one", 3);
        wanting.look(true).await.expect("look");
        assert!(
            !wanting.reshard(&name, 3).await.expect("ask"),
            "both are owned"
        );
        relays[0].release(true).await.expect("release");
        assert!(
            !wanting.reshard(&name, 3).await.expect("ask"),
            "one is owned"
        );
        relays[1].release(false).await.expect("release");
        assert!(
            !wanting.reshard(&name, 3).await.expect("ask"),
            "one is not settled"
        );
        let (_, mut again) = database.shard(shard(1, 2), "the only one");
        assert!(matches!(
            again.acquire().await.expect("acquire"),
            Acquired::Ours(_)
        ));
        again.release(true).await.expect("release");
        let mut other = roster(database, "another", 2);
        other.look(true).await.expect("look");
        assert!(
            !wanting.reshard(&name, 3).await.expect("ask"),
            "somebody wants two"
        );
        other.leave().await.expect("leave");
        assert!(wanting.reshard(&name, 3).await.expect("ask"));
        assert_eq!(
            again.acquire().await.expect("acquire"),
            Acquired::Resharded { shards: 3 }
        );
        assert_eq!(
            relays[0]
                .acknowledge(&Position::beginning())
                .await
                .expect("acknowledge"),
            Fenced::Lost,
            "a former owner writes nothing"
        );
        assert!(matches!(
            stranger.acquire().await.expect("acquire"),
            Acquired::Ours(_)
        ));
    })
    .await;
}
