//! A backlog is drained: payloads, backlogs, transactions, keys, topics, delivery, compression, pipelines, shards, filter.

use anyhow::Error;

use super::{NAKED, NAKED_WITH_HEADERS, add, in_turn};
use crate::drain::{self, Backlog, Drain, to_f64};
use crate::report::{Place, Report};
use crate::workload::{Keys, PAYLOAD_BYTES, Workload};
use crate::world::{Setup, World};

const CASE: &str = "drain";
const BASE: &str = "233 B";
const SMALL: &str = "backlog / 10";

/// One shape of a drain.
struct Variant {
    name: &'static str,
    workload: Workload,
    setup: Setup,
    /// Another variant of the same round, which this one should not be much slower than.
    beside: Option<&'static str>,
    /// Also beside a bare loop that makes the same records.
    like_for_like: bool,
    axes: Vec<(&'static str, f64)>,
}

pub async fn run(world: &World, report: &mut Report) -> Result<(), Error> {
    let variants = variants(world.sizes.events, world.sizes.large);
    for round in 0..world.sizes.rounds {
        let mut relays: Vec<(&str, Drain)> = Vec::new();
        for variant in variants.iter().filter(|variant| world.wants(variant.name)) {
            let relay = measure(world, variant, round, report).await?;
            let other = relays
                .iter()
                .find(|(name, _)| Some(*name) == variant.beside);
            if let Some((name, other)) = other {
                let place = Place {
                    case: CASE,
                    variant: variant.name,
                    limit: &format!("relay, {name}"),
                };
                add(report, &place, &relay, other);
            }
            relays.push((variant.name, relay));
        }
    }
    world.forget_backlogs().await
}

async fn measure(
    world: &World,
    variant: &Variant,
    round: u32,
    report: &mut Report,
) -> Result<Drain, Error> {
    let log = world.backlog(variant.workload).await?;
    let backlog = Backlog::all(&log, variant.workload);
    let (relay, naked) = in_turn(
        round,
        drain::relay(world, &backlog, &variant.setup),
        drain::naked(world, &backlog, &variant.setup),
    )
    .await?;
    let place = Place {
        case: CASE,
        variant: variant.name,
        limit: NAKED,
    };
    add(report, &place, &relay, &naked);
    if variant.like_for_like {
        let naked = drain::bare(world, &backlog, &variant.setup, true).await?;
        let limit = NAKED_WITH_HEADERS;
        add(report, &Place { limit, ..place }, &relay, &naked);
    }
    for row in &mut report.rows {
        if (&row.case[..], &row.variant[..], &row.limit[..]) == (CASE, variant.name, NAKED) {
            let axes = variant
                .axes
                .iter()
                .map(|(axis, at)| ((*axis).to_owned(), *at));
            row.axes = axes.collect();
        }
    }
    Ok(relay)
}

fn variants(events: i64, large: bool) -> Vec<Variant> {
    let mut variants = sizes(events);
    variants.extend(shapes(Workload::of(events)));
    variants.extend(setups(Workload::of(events)));
    if large {
        variants.push(backlog("backlog x 10", events * 10));
    }
    variants
}

fn plain(name: &'static str, workload: Workload) -> Variant {
    Variant {
        name,
        workload,
        setup: Setup::default(),
        beside: None,
        like_for_like: false,
        axes: Vec::new(),
    }
}

fn backlog(name: &'static str, events: i64) -> Variant {
    Variant {
        beside: Some(SMALL),
        axes: vec![("backlog", to_f64(events))],
        ..plain(name, Workload::of(events))
    }
}

/// The first two come first: others are measured beside them.
fn sizes(events: i64) -> Vec<Variant> {
    let mut base = backlog(BASE, events);
    base.like_for_like = true;
    base.axes.extend([
        ("payload bytes", f64::from(PAYLOAD_BYTES)),
        ("pipelines", 1.0),
        ("shards", 1.0),
    ]);
    let payload = |name, payload_bytes, events| Variant {
        axes: vec![("payload bytes", f64::from(payload_bytes))],
        ..plain(
            name,
            Workload {
                payload_bytes,
                ..Workload::of(events)
            },
        )
    };
    vec![
        backlog(SMALL, events / 10),
        base,
        payload("1 KiB", 1024, events / 4),
        payload("8 KiB", 8192, events / 10),
    ]
}

fn shapes(base: Workload) -> Vec<Variant> {
    vec![
        plain(
            "1 event per transaction",
            Workload {
                per_transaction: 1,
                ..base
            },
        ),
        plain(
            "Zipf keys",
            Workload {
                keys: Keys::Zipf,
                ..base
            },
        ),
        plain("3 topics", Workload { topics: 3, ..base }),
        plain("50 topics", Workload { topics: 50, ..base }),
    ]
}

fn setups(base: Workload) -> Vec<Variant> {
    let with = |name, setup| Variant {
        setup,
        beside: Some(BASE),
        ..plain(name, base)
    };
    let default = Setup::default();
    let piped = |name, pipelines: u32| Variant {
        axes: vec![("pipelines", f64::from(pipelines))],
        ..with(
            name,
            Setup {
                pipelines: pipelines as usize,
                ..default
            },
        )
    };
    let sharded = |name, shards| Variant {
        axes: vec![("shards", f64::from(shards))],
        ..with(name, Setup { shards, ..default })
    };
    let compressed = |name, compression| {
        with(
            name,
            Setup {
                compression,
                ..default
            },
        )
    };
    vec![
        Variant {
            like_for_like: true,
            ..with(
                "exactly-once",
                Setup {
                    exactly_once: true,
                    ..default
                },
            )
        },
        piped("2 pipelines", 2),
        piped("4 pipelines", 4),
        piped("8 pipelines", 8),
        compressed("233 B, not compressed", "none"),
        compressed("233 B, zstd", "zstd"),
        sharded("2 shards", 2),
        sharded("4 shards", 4),
        with(
            "filter drops 90 %",
            Setup {
                filtered: true,
                ..default
            },
        ),
    ]
}
