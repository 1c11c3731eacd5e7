//! The broker end: takes records over in order and says which arrived. (source → order → route → encode → *sink*)
//!
//! Two words for durability everywhere: *handed over* and *delivered*. Only the second moves progress (I3).

pub mod kafka;
pub mod stdout;

use std::future::{Future, ready};

use futures_util::future::BoxFuture;

use crate::event::{Record, Rejection, Seq};
use crate::position::Position;

/// Why a record was not handed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The queue is full, or a receipt has something to say first: wait for receipts, then hand over the same record.
    Full,
    /// The part of the sink that it goes to takes nothing at the moment, for this reason: records for other parts go on.
    Later(String),
    /// Its topic is not known, or has to be looked up again.
    Unprepared,
    /// It will never be accepted, and nothing after it has been handed over.
    Rejected(Rejection),
    /// The sink is of no use any more until it is opened again.
    Broken(SinkError),
}

/// The sink lost its place: records handed over may or may not have arrived.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SinkError(pub String);

/// What became of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Receipt {
    /// It is where consumers will find it, whatever happens now.
    Delivered(Seq),
    /// It was refused for good, and with it this life has ended: what was handed over after it may or may not have
    /// arrived. Records that share a batch share its fate, and each gets this receipt: only one that was handed over
    /// alone, with nothing else in flight, is surely to blame.
    Rejected(Seq, Rejection),
}

/// Why a topic can't be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotPrepared {
    /// Records for it are rejected.
    Rejected(Rejection),
    /// The broker could not say, or could not make it; try again.
    Unknown(SinkError),
    /// The client has to be set up anew for it: once all that was handed over has its receipt, the sink is to be opened again.
    Reopen(SinkError),
}

/// What a look-up has found out about a topic; [`Sink::learn`] takes it over.
#[derive(Clone, Debug, Default)]
pub struct Known(pub(crate) Option<kafka::Found>);

/// Topics that are being looked up; it borrows nothing of the sink.
pub type LookUp = BoxFuture<'static, Vec<(String, Result<Known, NotPrepared>)>>;

/// Publishes records.
///
/// The contract, held by one suite for every sink and for the fakes: records of one key arrive in the order of their
/// hand-over; a receipt [`Delivered`](Receipt::Delivered) is final; trouble that may pass (broker down, leader moving)
/// rejects nothing; after [`Broken`](Refused::Broken) or [`Receipt::Rejected`] nothing of the old life is received any more
/// once the sink is opened again.
pub trait Sink: Send {
    /// Begins a life: forgets what was handed over before, and stops sending what is still queued of it.
    ///
    /// # Errors
    /// When the settings can't work.
    fn open(&mut self) -> impl Future<Output = Result<(), SinkError>> + Send;

    /// Ends the life, if there is one: what is queued is not sent any more. The next one begins with [`open`](Sink::open).
    fn close(&mut self) -> impl Future<Output = ()> + Send;

    /// Takes over from whoever published under this name before, and reads which position was last
    /// [committed](Sink::commit) in this log, if the sink commits positions. Once in a life, before the first record.
    ///
    /// # Errors
    /// When the other end does not answer.
    fn resume(
        &mut self,
        _log: &str,
    ) -> impl Future<Output = Result<Option<Position>, SinkError>> + Send {
        ready(Ok(None))
    }

    /// Asks whether the other end can be reached at all; cheap enough for once a second.
    ///
    /// # Errors
    /// When it can't, with the reason as far as it is known.
    fn check(&mut self) -> impl Future<Output = Result<(), SinkError>> + Send;

    /// Whether the other end answers others, but is no longer reached in this life, which has to be ended then. Takes
    /// seconds; nothing is known for sure while the other end is only slow.
    fn is_cut_off(&mut self) -> impl Future<Output = bool> + Send {
        ready(false)
    }

    /// What a person has to hear about records that are published all the same. Asked once a second; each is told once. What is
    /// still being counted comes at the end only.
    fn warnings(&mut self, _at_the_end: bool) -> Vec<String> {
        Vec::new()
    }

    /// Why a session that begins now would be made of other values than this one, such as a password or a certificate that
    /// was replaced. Asked once a second while the sink is in trouble.
    fn outdated(&self) -> Option<String> {
        None
    }

    /// Makes sure that topics exist (creating them if so configured), beside the flow: records of other topics are handed
    /// over meanwhile. Every topic gets an answer.
    fn look_up(&mut self, topics: Vec<String>) -> LookUp;

    /// Takes over the answer of a look-up: a topic that was found gets records from now on, also after the sink is opened
    /// again.
    ///
    /// # Errors
    /// That of the look-up, or [`NotPrepared::Reopen`].
    fn learn(&mut self, topic: &str, answer: Result<Known, NotPrepared>)
    -> Result<(), NotPrepared>;

    /// Looks a topic up and waits for the answer.
    ///
    /// # Errors
    /// [`NotPrepared`].
    fn prepare(&mut self, topic: &str) -> impl Future<Output = Result<(), NotPrepared>> + Send {
        let looked_up = self.look_up(vec![topic.to_owned()]);
        async move {
            for (name, known) in looked_up.await {
                self.learn(&name, known)?;
            }
            Ok(())
        }
    }

    /// What is known of the limits of topics may be out of date: before a record is refused by one of them, its topic has to
    /// be looked up again.
    fn doubt(&mut self) {}

    /// Whether an event may wait for its topic while later ones are handed over. A sink that commits a position with the
    /// records can't leave an event behind.
    fn leaves_behind(&self) -> bool {
        true
    }

    /// Hands a record over without waiting.
    ///
    /// # Errors
    /// [`Refused`]; the record was not handed over.
    fn hand_over(&mut self, seq: Seq, record: &Record<'_>) -> Result<(), Refused>;

    /// Ends a batch: everything up to this position is handed over or settled otherwise. A sink that commits positions
    /// gives its receipts for a batch when all of it is there with the position, as one; until then it is
    /// [full](Refused::Full). The others need not know.
    fn commit(&mut self, _position: &Position) {}

    /// Waits for receipts and appends them, at least one, or until there may be room again where it was full. A sink that
    /// gives the receipts of a batch as one returns without any from time to time, as a sign of life, while records of a
    /// long batch arrive.
    ///
    /// # Cancel safety
    /// Safe: no receipt is lost.
    ///
    /// # Errors
    /// When records that were handed over will get no receipt; those that were appended before count.
    fn receipts(
        &mut self,
        into: &mut Vec<Receipt>,
    ) -> impl Future<Output = Result<(), SinkError>> + Send;

    /// What is wrong with the connection at the moment, as far as the sink knows.
    fn trouble(&self) -> Option<String>;
}

/// The sinks that run in production.
pub enum AnySink {
    /// Apache Kafka.
    Kafka(Box<kafka::KafkaSink>),
    /// JSON lines on the standard output.
    Stdout(stdout::StdoutSink),
}

impl Sink for AnySink {
    async fn open(&mut self) -> Result<(), SinkError> {
        match self {
            Self::Kafka(sink) => sink.open().await,
            Self::Stdout(sink) => sink.open().await,
        }
    }

    async fn close(&mut self) {
        match self {
            Self::Kafka(sink) => sink.close().await,
            Self::Stdout(sink) => sink.close().await,
        }
    }

    async fn resume(&mut self, log: &str) -> Result<Option<Position>, SinkError> {
        match self {
            Self::Kafka(sink) => sink.resume(log).await,
            Self::Stdout(sink) => sink.resume(log).await,
        }
    }

    fn commit(&mut self, position: &Position) {
        match self {
            Self::Kafka(sink) => sink.commit(position),
            Self::Stdout(sink) => sink.commit(position),
        }
    }

    async fn check(&mut self) -> Result<(), SinkError> {
        match self {
            Self::Kafka(sink) => sink.check().await,
            Self::Stdout(sink) => sink.check().await,
        }
    }

    async fn is_cut_off(&mut self) -> bool {
        match self {
            Self::Kafka(sink) => sink.is_cut_off().await,
            Self::Stdout(sink) => sink.is_cut_off().await,
        }
    }

    fn warnings(&mut self, at_the_end: bool) -> Vec<String> {
        match self {
            Self::Kafka(sink) => sink.warnings(at_the_end),
            Self::Stdout(sink) => sink.warnings(at_the_end),
        }
    }

    fn outdated(&self) -> Option<String> {
        match self {
            Self::Kafka(sink) => sink.outdated(),
            Self::Stdout(sink) => sink.outdated(),
        }
    }

    fn look_up(&mut self, topics: Vec<String>) -> LookUp {
        match self {
            Self::Kafka(sink) => sink.look_up(topics),
            Self::Stdout(sink) => sink.look_up(topics),
        }
    }

    fn learn(
        &mut self,
        topic: &str,
        answer: Result<Known, NotPrepared>,
    ) -> Result<(), NotPrepared> {
        match self {
            Self::Kafka(sink) => sink.learn(topic, answer),
            Self::Stdout(sink) => sink.learn(topic, answer),
        }
    }

    fn doubt(&mut self) {
        match self {
            Self::Kafka(sink) => sink.doubt(),
            Self::Stdout(sink) => sink.doubt(),
        }
    }

    fn leaves_behind(&self) -> bool {
        match self {
            Self::Kafka(sink) => sink.leaves_behind(),
            Self::Stdout(sink) => sink.leaves_behind(),
        }
    }

    fn hand_over(&mut self, seq: Seq, record: &Record<'_>) -> Result<(), Refused> {
        match self {
            Self::Kafka(sink) => sink.hand_over(seq, record),
            Self::Stdout(sink) => sink.hand_over(seq, record),
        }
    }

    async fn receipts(&mut self, into: &mut Vec<Receipt>) -> Result<(), SinkError> {
        match self {
            Self::Kafka(sink) => sink.receipts(into).await,
            Self::Stdout(sink) => sink.receipts(into).await,
        }
    }

    fn trouble(&self) -> Option<String> {
        match self {
            Self::Kafka(sink) => sink.trouble(),
            Self::Stdout(sink) => sink.trouble(),
        }
    }
}
