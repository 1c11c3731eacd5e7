//! A producer with a thread that takes what it has to say.
//!
//! Stands for `ThreadedProducer` of the binding, whose thread waits whole milliseconds within a turn of 100 ms and spins for
//! the fraction that is left: nine tenths of what an idle relay cost.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rdkafka::config::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::producer::{BaseProducer, ProducerContext};

/// Whole milliseconds, in which librdkafka waits, and as much more as it takes to come back from that: nothing is left to
/// spin for. The end of a producer waits for the end of a turn.
const TURN: Duration = Duration::from_micros(100_100);

/// Clones share the producer; the last one ends it, and waits for its thread.
pub(super) struct PolledProducer<C: ProducerContext + 'static>(Arc<Polled<C>>);

struct Polled<C: ProducerContext + 'static> {
    producer: Arc<BaseProducer<C>>,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl<C: ProducerContext + 'static> PolledProducer<C> {
    /// # Errors
    /// When librdkafka refuses a setting, or there can be no more threads.
    pub(super) fn create(config: &ClientConfig, context: C) -> Result<Self, KafkaError> {
        let producer: Arc<BaseProducer<C>> = Arc::new(config.create_with_context(context)?);
        let stopping = Arc::new(AtomicBool::new(false));
        let (polled, told) = (producer.clone(), stopping.clone());
        let poll = move || {
            while !told.load(Ordering::Relaxed) {
                polled.poll(TURN);
            }
        };
        let thread = thread::Builder::new()
            .name("kafka receipts".to_owned())
            .spawn(poll)
            .map_err(|error| KafkaError::ClientCreation(format!("start a thread: {error}")))?;
        Ok(Self(Arc::new(Polled {
            producer,
            stopping,
            thread: Some(thread),
        })))
    }
}

impl<C: ProducerContext + 'static> Clone for PolledProducer<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<C: ProducerContext + 'static> Deref for PolledProducer<C> {
    type Target = BaseProducer<C>;

    fn deref(&self) -> &Self::Target {
        &self.0.producer
    }
}

impl<C: ProducerContext + 'static> Drop for Polled<C> {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that takes receipts panicked");
        }
    }
}
