//! Questions of a producer about topics, which go on beside the flow.

use std::sync::Arc;

use rdkafka::error::KafkaError;
use rdkafka::producer::Producer;
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use super::life::{KafkaProducer, ask, with_trouble};
use super::{Found, Known, NotPrepared, SinkError, trouble};

/// Makes a producer acquainted with topics, while records of other topics are handed over.
pub(super) struct Asker {
    pub(super) producer: KafkaProducer,
    pub(super) trouble: Arc<watch::Sender<Option<String>>>,
}

impl Asker {
    /// So many topics are asked for one by one. The producer asks for the others when their first records come, and then has
    /// its own id already.
    const ONE_BY_ONE: usize = 8;

    pub(super) async fn metadata(&self, topic: Option<&str>) -> Result<(), KafkaError> {
        let (producer, topic) = (self.producer.clone(), topic.map(str::to_owned));
        // librdkafka waits in the call.
        let asked = spawn_blocking(move || ask(producer.client(), topic.as_deref()));
        asked.await.unwrap_or(Err(KafkaError::Canceled))
    }

    /// Else the producer would ask only when the first record waits for it, and for its own id up to half a second later: it
    /// asks for that when a broker tells it of others, or by a slow clock.
    pub(super) async fn introduce(
        &self,
        found: Vec<(String, Result<Found, NotPrepared>)>,
    ) -> Vec<(String, Result<Known, NotPrepared>)> {
        let mut answers = Vec::with_capacity(found.len());
        let mut introduced = 0;
        for (name, mut answer) in found {
            if answer.is_ok() && introduced < Self::ONE_BY_ONE {
                introduced += 1;
                if let Err(error) = self.metadata(Some(&name)).await {
                    let why = format!("ask about topic {name}: {}", trouble::answer(&error));
                    answer = Err(NotPrepared::Unknown(SinkError(why)));
                }
            }
            if let Err(NotPrepared::Unknown(SinkError(why))) = &mut answer {
                *why = with_trouble(&self.trouble, std::mem::take(why));
            }
            answers.push((name, answer.map(|found| Known(Some(found)))));
        }
        answers
    }
}
