//! One producer, from its creation to its end.
//!
//! librdkafka forgets nothing by itself and never forgives a fatal error, so that a new life needs a new producer.

use std::sync::Arc;

use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::DeliveryResult;
use rdkafka::producer::{
    NoCustomPartitioner, Producer, ProducerContext, PurgeConfig, ThreadedProducer,
};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;

use super::{Receipt, SinkError, log_librdkafka, rejects};
use crate::event::{Rejection, Seq};

/// A producer and what it says.
pub(super) struct Life {
    pub(super) producer: ThreadedProducer<Context, NoCustomPartitioner>,
    pub(super) trouble: Arc<watch::Sender<Option<String>>>,
    deliveries: mpsc::UnboundedReceiver<Delivery>,
    received: Vec<Delivery>,
}

/// What librdkafka says about one record.
struct Delivery {
    seq: Seq,
    failure: Option<Code>,
}

/// Runs on librdkafka's polling thread; only passes on what happened.
pub(super) struct Context {
    deliveries: mpsc::UnboundedSender<Delivery>,
    trouble: Arc<watch::Sender<Option<String>>>,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        log_librdkafka(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.trouble
            .send_replace(Some(match error.rdkafka_error_code() {
                Some(code) => format!("{code}: {reason}"),
                None => reason.to_owned(),
            }));
    }
}

impl ProducerContext for Context {
    /// A sequence number, carried as a pointer's bits: nothing is allocated per record.
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, opaque: usize) {
        let failure = match result {
            Ok(_) => None,
            Err((KafkaError::MessageProduction(code), _)) => Some(*code),
            Err(_) => Some(Code::Unknown),
        };
        // The receiver is gone when a life has ended: nobody waits for these receipts.
        let _ = self.deliveries.send(Delivery {
            seq: Seq(opaque as u64),
            failure,
        });
    }
}

impl Life {
    pub(super) fn begin(config: &ClientConfig) -> Result<Self, SinkError> {
        let (sender, deliveries) = mpsc::unbounded_channel();
        let trouble = Arc::new(watch::Sender::new(None));
        let context = Context {
            deliveries: sender,
            trouble: trouble.clone(),
        };
        let producer = config
            .create_with_context(context)
            .map_err(|error: KafkaError| {
                SinkError(format!("set up the Kafka producer: {error}"))
            })?;
        Ok(Self {
            producer,
            trouble,
            deliveries,
            received: Vec::new(),
        })
    }

    /// Returns when nothing that is queued will be sent any more.
    pub(super) async fn end(self) {
        // Both wait for librdkafka's threads, which may be looking a name up.
        let purged = spawn_blocking(move || {
            self.purge();
            self.producer
        });
        if let Ok(producer) = purged.await {
            spawn_blocking(move || drop(producer));
        }
    }

    fn purge(&self) {
        self.producer
            .purge(PurgeConfig::default().queue().inflight());
    }

    /// As [`Sink::receipts`](super::Sink::receipts).
    pub(super) async fn receipts(&mut self, into: &mut Vec<Receipt>) -> Result<(), SinkError> {
        const AT_ONCE: usize = 8192;
        self.received.clear();
        self.deliveries.recv_many(&mut self.received, AT_ONCE).await;
        for Delivery { seq, failure } in &self.received {
            match failure {
                None => into.push(Receipt::Delivered(*seq)),
                Some(code) if rejects(*code) => {
                    into.push(Receipt::Rejected(*seq, Rejection::new(code.to_string())));
                }
                Some(code) => return Err(SinkError(self.with_trouble(code.to_string()))),
            }
        }
        self.trouble
            .send_if_modified(|trouble| trouble.take().is_some());
        Ok(())
    }

    /// Adds what librdkafka last complained about.
    pub(super) fn with_trouble(&self, reason: String) -> String {
        match &*self.trouble.borrow() {
            Some(trouble) => format!("{reason} ({trouble})"),
            None => reason,
        }
    }
}
