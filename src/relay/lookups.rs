//! Events whose topic is not known yet: they wait while it is looked up, and events of other topics go on.
//!
//! Each of them has its place in flight already, so that the position stays before it, and later events of its entity wait
//! behind it. Look-ups run beside the flow, one at a time, for all topics that are wanted by then. A topic about which the
//! brokers can't say is asked for again after growing pauses; that never ends a life.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::Duration;

use bytestring::ByteString;
use tokio::time::{Instant, sleep_until};

use super::publish::{Ended, Life, Pause, Publisher};
use super::topics::Topics;
use crate::event::{Event, PipelineName, Seq};
use crate::sink::{Known, LookUp, NotPrepared, Sink, SinkError};

/// Events that may wait for their topics; with more of them the hand-over pauses.
const HELD_MAX: usize = 10_000;
/// Topics that one look-up asks for.
const ASKED_AT_ONCE: usize = 1000;
/// How soon a topic is asked for again about which the brokers could not say, at first and then.
const AGAIN_MIN: Duration = Duration::from_millis(250);
const AGAIN_MAX: Duration = Duration::from_secs(5);

/// How soon that is tried again which a part of the sink did not take.
const LATE: Duration = Duration::from_secs(1);

type Entity = (ByteString, ByteString);
type Answers = Vec<(String, Result<Known, NotPrepared>)>;

/// The look-ups of one life, and what waits for them.
#[derive(Default)]
pub(super) struct Lookups {
    running: Option<LookUp>,
    /// Whether one has ended. Until then no topic is known, and there is nothing that could go on beside what waits.
    ended_once: bool,
    wanted: BTreeMap<String, Wanted>,
    /// In log order.
    events: VecDeque<Held>,
    entities: HashMap<Entity, usize>,
    /// How many places in flight are those of held events.
    places: usize,
    /// Whether some of the events may go on.
    due: bool,
    /// When those are tried again that a part of the sink did not take, and why it did not.
    late: Option<(Instant, String)>,
}

struct Wanted {
    ask_at: Instant,
    pause: Duration,
    asked: bool,
    /// Why the last answer said nothing.
    reason: Option<String>,
}

struct Held {
    seq: Seq,
    event: Event,
    bytes: usize,
    /// None for one that waits behind another event of its entity.
    topic: Option<String>,
}

impl Held {
    fn entity(&self) -> Entity {
        entity(&self.event)
    }
}

fn entity(event: &Event) -> Entity {
    (event.aggregate_type.clone(), event.aggregate_id.clone())
}

impl Lookups {
    pub(super) fn want(&mut self, topic: &str) {
        if self.wanted.contains_key(topic) {
            return;
        }
        let wanted = Wanted {
            ask_at: Instant::now(),
            pause: AGAIN_MIN,
            asked: false,
            reason: None,
        };
        self.wanted.insert(topic.to_owned(), wanted);
    }

    /// A part of the sink takes nothing: what waits for it is tried again soon.
    pub(super) fn late(&mut self, pipeline: &PipelineName, reason: String) {
        let told = self.late.as_ref().is_some_and(|(_, told)| *told == reason);
        if !told {
            tracing::warn!(%pipeline, reason, "a part of the sink takes nothing: its events wait, the others go on");
        }
        self.late = Some((Instant::now() + LATE, reason));
    }

    /// How many events wait.
    pub(super) fn held(&self) -> usize {
        self.places
    }

    /// Whether an event waits that comes before this one in the log.
    pub(super) fn holds_before(&self, seq: Seq) -> bool {
        self.events.front().is_some_and(|held| held.seq < seq)
    }

    pub(super) fn has_room(&self) -> bool {
        self.ended_once && self.places < HELD_MAX
    }

    /// Whether an earlier event of the entity waits.
    pub(super) fn holds(&self, event: &Event) -> bool {
        !self.entities.is_empty() && self.entities.contains_key(&entity(event))
    }

    pub(super) fn hold(&mut self, seq: Seq, event: &Event, bytes: usize, topic: Option<String>) {
        let held = Held {
            seq,
            event: event.clone(),
            bytes,
            topic,
        };
        self.places += 1;
        self.keep(held);
    }

    fn keep(&mut self, held: Held) {
        *self.entities.entry(held.entity()).or_default() += 1;
        self.events.push_back(held);
    }

    /// The last answer about a topic, where it said nothing.
    pub(super) fn trouble_of(&self, topic: &str) -> Option<&str> {
        self.wanted.get(topic)?.reason.as_deref()
    }

    /// What is in the way of topics.
    pub(super) fn trouble(&self) -> Option<String> {
        if let Some((_, reason)) = &self.late {
            return Some(format!(
                "{reason}; {} events wait, the others go on",
                self.places
            ));
        }
        let reasons = self
            .wanted
            .values()
            .filter_map(|wanted| wanted.reason.as_ref());
        let (first, more) = (reasons.clone().next()?, reasons.count() - 1);
        let others = match more {
            0 => String::new(),
            more => format!(" (and {more} other topics)"),
        };
        Some(format!(
            "{first}{others}; {} events wait, those of other topics go on; the relay asks again every {} s at most",
            self.places,
            AGAIN_MAX.as_secs()
        ))
    }

    /// Gives up what waits: it is read again by the next life.
    pub(super) fn clear(&mut self) {
        self.events.clear();
        self.entities.clear();
        self.due = false;
    }

    /// Begins a look-up for what is wanted, unless one is running.
    fn begin<K: Sink>(&mut self, sink: &mut K) {
        if self.running.is_some() || self.wanted.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut names = Vec::new();
        for (name, wanted) in &mut self.wanted {
            wanted.asked = wanted.ask_at <= now && names.len() < ASKED_AT_ONCE;
            if wanted.asked {
                names.push(name.clone());
            }
        }
        if !names.is_empty() {
            self.running = Some(sink.look_up(names));
        }
    }

    /// Waits for the end of a look-up, or returns without answers when it is time for the next one.
    ///
    /// # Cancel safety
    /// Safe: the look-up goes on.
    pub(super) async fn answers(&mut self) -> Answers {
        let Some(running) = &mut self.running else {
            let asks = self.wanted.values().map(|wanted| wanted.ask_at);
            match asks.chain(self.late.as_ref().map(|(at, _)| *at)).min() {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
            return Vec::new();
        };
        let late = self.late.as_ref().map(|(at, _)| *at);
        let answers = tokio::select! {
            biased;
            answers = running => answers,
            () = until(late) => return Vec::new(),
        };
        self.running = None;
        self.ended_once = true;
        answers
    }

    /// Notes that the brokers could not say; true where that is news.
    fn unanswered(&mut self, topic: &str, why: &str) -> bool {
        let Some(wanted) = self.wanted.get_mut(topic) else {
            return false;
        };
        wanted.ask_at = Instant::now() + wanted.pause;
        wanted.pause = (wanted.pause * 2).min(AGAIN_MAX);
        wanted.reason.replace(why.to_owned()).is_none()
    }

    fn answered(&mut self, topic: &str) -> bool {
        self.due = true;
        let wanted = self.wanted.remove(topic);
        wanted.is_some_and(|wanted| wanted.reason.is_some())
    }
}

impl<K: Sink> Publisher<'_, K> {
    /// Begins a look-up for the topics that are wanted by now.
    pub(super) fn look_up(&mut self, life: &mut Life) {
        life.lookups.begin(self.sink);
    }

    /// Takes the answers of a look-up over.
    pub(super) fn learn(&mut self, life: &mut Life, answers: Answers) {
        let pipeline = &self.pipeline.name;
        for (topic, answer) in answers {
            match self.sink.learn(&topic, answer) {
                Ok(()) => {
                    if life.lookups.answered(&topic) {
                        tracing::info!(%pipeline, topic, "the topic is there: its events go on");
                    }
                }
                Err(NotPrepared::Rejected(rejection)) => {
                    life.lookups.answered(&topic);
                    life.topics.refuse(&topic, rejection);
                }
                Err(NotPrepared::Unknown(SinkError(reason))) => {
                    if life.lookups.unanswered(&topic, &reason) {
                        tracing::warn!(%pipeline, topic, reason,
                            "a topic is not ready: its events wait, those of other topics go on");
                    }
                }
                Err(NotPrepared::Reopen(error)) => {
                    life.lookups.answered(&topic);
                    life.reopen = Some(error);
                }
            }
        }
    }

    /// Whether an event may wait for its topic while the hand-over goes on.
    pub(super) fn may_hold(&self, life: &Life) -> bool {
        self.sink.leaves_behind() && self.suspects.is_empty() && life.lookups.has_room()
    }

    /// Hands over what has waited, as far as its topics are known now; says why it has to pause.
    pub(super) fn hand_over_held(&mut self, life: &mut Life) -> Result<Option<Pause>, Ended> {
        let late = life.lookups.late.take();
        let (at_last, before) = match late {
            Some((at, reason)) if at <= Instant::now() => (true, Some(reason)),
            late => {
                life.lookups.late = late;
                (false, None)
            }
        };
        if !std::mem::take(&mut life.lookups.due) && !at_last {
            return Ok(None);
        }
        life.lookups.entities.clear();
        let mut stopped: HashSet<Entity> = HashSet::new();
        let mut paused = None;
        for held in std::mem::take(&mut life.lookups.events) {
            let wanted = |topic: &String| life.lookups.wanted.contains_key(topic);
            let waits = paused.is_some()
                || held.topic.as_ref().is_some_and(wanted)
                || stopped.contains(&held.entity());
            if !waits {
                life.placed = Some(held.seq);
                let outcome = self.take_up(life, &held.event, held.bytes);
                life.placed = None;
                match outcome? {
                    None => {
                        life.lookups.places -= 1;
                        continue;
                    }
                    Some(Pause::Topic(topic)) => life.lookups.want(&topic),
                    Some(Pause::Later(reason)) => {
                        if before.as_ref() == Some(&reason) {
                            life.lookups.late = Some((Instant::now() + LATE, reason));
                        } else {
                            life.lookups.late(&self.pipeline.name, reason);
                        }
                    }
                    pause => {
                        paused = pause;
                        life.lookups.due = true;
                    }
                }
            }
            stopped.insert(held.entity());
            life.lookups.keep(held);
        }
        Ok(paused)
    }

    /// Asks for the topics of what is at hand together with the one that is needed first.
    pub(super) fn want(&mut self, life: &mut Life, topic: &str) {
        life.lookups.want(topic);
        for event in &life.pending {
            // What is filtered out must make no topic.
            if !life.filter(self.pipeline).admits(event).unwrap_or(false) {
                continue;
            }
            let Ok(topic) = self.pipeline.route.topic(event) else {
                continue;
            };
            if !life.topics.knows(&topic) && life.topics.refusal(&topic).is_none() {
                life.lookups.want(&topic);
            }
        }
    }
}

impl Life {
    /// Events that were handed over, of which the sink has not said yet what became of them.
    pub(super) fn awaited(&self) -> usize {
        let waiting = self.lookups.held() + self.parking_seqs.len();
        self.in_flight.unsettled().saturating_sub(waiting)
    }

    /// The number that the event at hand has, or will have.
    pub(super) fn seq_at_hand(&self) -> Seq {
        self.placed.unwrap_or_else(|| self.in_flight.next_seq())
    }

    /// Gives the event at hand its place in flight, where it has none yet.
    pub(super) fn place(&mut self, event: &Event, bytes: usize, tag: u32) -> Seq {
        match self.placed {
            Some(seq) => {
                self.in_flight.retag(seq, tag);
                seq
            }
            None => self
                .in_flight
                .push(event.key(), bytes, event.occurred_at_us, tag),
        }
    }

    /// Lets the event at hand wait for its topic, or behind one of its entity.
    pub(super) fn hold(&mut self, event: &Event, bytes: usize, topic: Option<String>) {
        let seq = self.place(event, bytes, Topics::NONE);
        self.lookups.hold(seq, event, bytes, topic);
    }
}

/// Waits for the deadline, for ever without one.
pub(super) async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
