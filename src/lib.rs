//! **outbox-relay** publishes the committed rows of a transactional outbox to Kafka, in order per entity.
//!
//! # The flow
//!
//! ```text
//! source  →  order  →  route  →  encode  →  sink  →  settled  →  acknowledged
//! ```
//!
//! | stage | what it does | where |
//! |---|---|---|
//! | source | captures committed events in log order, page by page | [`source::postgres`], [`source::sqlite`] |
//! | order | what is in flight, how far it is settled, which entities wait | [`order`] |
//! | route | whether an event concerns a pipeline, its topic and key | [`route`] |
//! | encode | makes a record of it | [`encode`] |
//! | sink | takes records over in order, says which arrived | [`sink::kafka`], [`sink::stdout`] |
//! | loop | where they meet, once per shard of a pipeline | [`relay`] |
//! | backlog | how much waits, asked of the store whatever the relays do | [`backlog`] |
//! | crew | which relay owns which shard of a pipeline | [`crew`] |
//! | ledger | the durable books: lease, cursor, parked events, what operators ask for | [`ledger`] |
//!
//! The outbox is a log: nothing updates or deletes a row to make progress, a pipeline holds a [`position::Position`]. The
//! position is deterministic, so that a crash at any point means reading again from the last one. How windows between two
//! snapshots lose nothing however late a transaction commits is told in [`position::Window`] and [`source::postgres`].
//!
//! # The promises
//!
//! * **I1** Only committed rows leave.
//! * **I2** Per entity (aggregate type and id) first deliveries follow commit order.
//! * **I3** Progress moves only past what the sink confirmed or what is durably parked.
//! * **I4** Every committed row is delivered or visibly parked, however late its transaction commits.
//! * **I5** Rows and bytes in memory are bounded, whatever the backlog.
//! * **I6** A rejected event affects its own entity and nobody else; a failing pipeline no other pipeline.
//! * **I7** Hints change latency only.
//! * **I8** Of many replicas one owns a (pipeline, shard); an owner that lost its lease publishes nothing new.
//! * **I9** In exactly-once mode a consumer of committed records sees each event once, across any crash of relay and broker.
//!   Else delivery is at least once, and consumers deduplicate by the header `id`.
//!
//! [`verify`] judges them from outside, by the log and the topics alone, and shares no code with what it judges.
//!
//! # The layers
//!
//! A module may use those to its left; a test reads the imports and names whoever does otherwise.
//!
//! ```text
//! words            rules                  ends                    loop    shell                         door
//! event position ← order route encode  ←  source sink ledger   ←  relay ← config crew supervise …    ←  cli main
//! ```
//!
//! `source`, `sink` and `ledger` know neither each other nor the rules. [`telemetry`] names every metric, [`supervise`] is the
//! only place that starts tasks, and [`config`] turns text into types once.

pub mod admin;
pub mod backlog;
pub mod cli;
pub mod config;
mod crash;
pub mod crew;
mod database;
mod demo;
pub mod doctor;
pub mod encode;
pub mod event;
pub mod ledger;
pub mod logging;
pub mod migrate;
pub mod order;
pub mod position;
pub mod reason;
pub mod relay;
pub mod reload;
pub mod replay;
pub mod retention;
pub mod route;
pub mod sink;
pub mod source;
pub mod supervise;
pub mod telemetry;
pub mod verify;
