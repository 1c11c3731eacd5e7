//! Publishes retained events again, beside the live flow and without touching its order or its cursor.
//!
//! A replay reads the log by what it is asked for, takes each event through the pipeline's filter, route and encoding, marks
//! it with a header, and waits for the confirmations of one page before it reads the next. Where it has come to is durable
//! after every page: it can be stopped, cancelled from elsewhere, and resumed; what was under way then is published again.

pub mod books;

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, Error, anyhow};
use tokio::time::{Instant, sleep_until};

use self::books::{Books, Job};
use crate::encode::{Texts, encode};
use crate::event::{Event, EventId, Record, Rejection, Seq};
use crate::relay::Pipeline;
use crate::sink::{NotPrepared, Receipt, Refused, Sink};
use crate::source::AnyHistory;

/// The header that tells a consumer that a record is a replay; its value is the replay's number.
pub const HEADER: &str = "replay";

/// Events that are published before the next look at the rate, at most.
const PAGE_ROWS: usize = 1_000;
/// A page is so small that the rate is held within a second.
const PAGES_PER_SECOND: usize = 4;

/// How a replay ended, other than with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Everything that was asked for is published.
    Done,
    /// Somebody cancelled it, or resumed it elsewhere.
    TakenAway,
}

/// Publishes what a job has left to publish; tells of every page.
///
/// # Errors
/// When database or broker fail. The job can be resumed.
pub(crate) async fn run(
    job: &mut Job,
    pipeline: &Pipeline,
    sink: &mut impl Sink,
    (history, books): (&mut AnyHistory, &mut Books),
    mut tell: impl FnMut(&Job),
) -> Result<End, Error> {
    sink.open().await?;
    let rate = usize::try_from(job.rate.max(1))?;
    let rows = (rate / PAGES_PER_SECOND).clamp(1, PAGE_ROWS);
    while job.last_id < job.until {
        let began = Instant::now();
        let (events, read_to) = history
            .page(&job.selection, (job.last_id, job.until), rows)
            .await
            .context("read the log")?;
        let published = Publisher { job, pipeline }.page(sink, &events).await?;
        job.published += published as u64;
        job.skipped += (events.len() - published) as u64;
        job.last_id = read_to;
        if !books.progress(job).await? {
            return Ok(End::TakenAway);
        }
        tell(job);
        let pause = Duration::from_secs(1) * u32::try_from(events.len())? / u32::try_from(rate)?;
        sleep_until(began + pause).await;
    }
    Ok(if books.finish(job).await? {
        End::Done
    } else {
        End::TakenAway
    })
}

/// How many events a job would publish, and of how many entities; publishes nothing.
///
/// # Errors
/// When the database fails.
pub(crate) async fn count(
    job: &Job,
    pipeline: &Pipeline,
    history: &mut AnyHistory,
) -> Result<(u64, usize), Error> {
    let (mut events_found, mut entities) = (0, HashSet::new());
    let mut after = job.last_id;
    while after < job.until {
        let (events, read_to) = history
            .page(&job.selection, (after, job.until), PAGE_ROWS)
            .await
            .context("read the log")?;
        for event in &events {
            if matches!(pipeline.filter.admits(event), Ok(true)) {
                events_found += 1;
                entities.insert((event.aggregate_type.clone(), event.aggregate_id.clone()));
            }
        }
        after = read_to;
    }
    Ok((events_found, entities.len()))
}

struct Publisher<'a> {
    job: &'a Job,
    pipeline: &'a Pipeline,
}

impl Publisher<'_> {
    /// Publishes a page and waits for all of it; returns how many events are published. The others are not for this
    /// pipeline or can't be published, which is logged.
    async fn page(&self, sink: &mut impl Sink, events: &[Event]) -> Result<usize, Error> {
        let mut refused = HashSet::new();
        match self.hand_over(sink, events, &mut refused).await? {
            Ok(published) => Ok(published),
            // A batch shares the fate of one record: alone each of them is judged for itself.
            Err(Batch) => {
                let mut published = 0;
                for event in events {
                    sink.open().await?;
                    let one = std::slice::from_ref(event);
                    match self.hand_over(sink, one, &mut refused).await? {
                        Ok(count) => published += count,
                        Err(Batch) => {
                            tracing::warn!(
                                event = event.id.0,
                                "the broker refused the event: left out"
                            );
                        }
                    }
                }
                sink.open().await?;
                Ok(published)
            }
        }
    }

    async fn hand_over(
        &self,
        sink: &mut impl Sink,
        events: &[Event],
        left_out: &mut HashSet<EventId>,
    ) -> Result<Result<usize, Batch>, Error> {
        let mut outstanding = 0;
        let mut published = 0;
        for (seq, event) in (0..).zip(events) {
            match self.pipeline.filter.admits(event) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(rejection) => {
                    leave_out(left_out, event, &rejection);
                    continue;
                }
            }
            let texts = Texts::of(event);
            let record = match self.record(event, &texts) {
                Ok(record) => record,
                Err(rejection) => {
                    leave_out(left_out, event, &rejection);
                    continue;
                }
            };
            loop {
                match sink.hand_over(Seq(seq), &record) {
                    Ok(()) => {
                        outstanding += 1;
                        published += 1;
                        break;
                    }
                    Err(Refused::Full | Refused::Later(_)) => {
                        if !settle(sink, &mut outstanding).await? {
                            return Ok(Err(Batch));
                        }
                    }
                    Err(Refused::Unprepared) => match sink.prepare(&record.topic).await {
                        Ok(()) => {}
                        Err(NotPrepared::Rejected(rejection)) => {
                            leave_out(left_out, event, &rejection);
                            break;
                        }
                        Err(NotPrepared::Unknown(error) | NotPrepared::Reopen(error)) => {
                            return Err(error.into());
                        }
                    },
                    Err(Refused::Rejected(rejection)) => {
                        leave_out(left_out, event, &rejection);
                        break;
                    }
                    Err(Refused::Broken(error)) => return Err(error.into()),
                }
            }
        }
        while outstanding > 0 {
            if !settle(sink, &mut outstanding).await? {
                return Ok(Err(Batch));
            }
        }
        Ok(Ok(published))
    }

    fn record<'e>(&'e self, event: &'e Event, texts: &'e Texts) -> Result<Record<'e>, Rejection> {
        let Pipeline {
            route, encoding, ..
        } = self.pipeline;
        let mut record = encode(event, texts, route, encoding)?;
        if let Some(topic) = &self.job.topic {
            record.topic = topic.into();
        }
        let number = self.job.id.to_string().into_bytes();
        record.headers.push((HEADER.into(), Some(number.into())));
        Ok(record)
    }
}

/// The broker refused one of several records.
struct Batch;

/// Waits for confirmations; false when the broker refused a record.
async fn settle(sink: &mut impl Sink, outstanding: &mut usize) -> Result<bool, Error> {
    /// A broker that is silent for so long is given up, and the replay is resumed later.
    const SILENCE_MAX: Duration = Duration::from_mins(1);
    let mut receipts = Vec::new();
    tokio::time::timeout(SILENCE_MAX, sink.receipts(&mut receipts))
        .await
        .map_err(|_| anyhow!("the broker has confirmed nothing for a minute"))??;
    let delivered = receipts
        .iter()
        .filter(|receipt| matches!(receipt, Receipt::Delivered(_)))
        .count();
    *outstanding = outstanding.saturating_sub(delivered);
    Ok(delivered == receipts.len())
}

fn leave_out(left_out: &mut HashSet<EventId>, event: &Event, rejection: &Rejection) {
    if left_out.insert(event.id) {
        tracing::warn!(event = event.id.0, reason = %rejection, "the event can't be published: left out");
    }
}
