//! Writes records to the standard output, one JSON object a line: for dry runs and pipes.
//!
//! A record counts as delivered when the line has been flushed.

use std::collections::HashSet;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value, json};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;

use super::{Known, LookUp, NotPrepared, Receipt, Refused, Sink, SinkError};
use crate::event::{Record, Seq};

/// Lines collected before they are written, unless receipts are asked for.
const BUFFER_BYTES: usize = 64 * 1024;

/// For lines of a life that has ended.
const OLD_LINES_MAX: Duration = Duration::from_secs(1);

/// The standard output, or any other writer.
pub struct StdoutSink {
    out: Arc<Mutex<Box<dyn Write + Send>>>,
    buffer: Vec<u8>,
    handed_over: Vec<Seq>,
    writing: Option<Writing>,
    prepared: HashSet<String>,
}

/// Lines on their way. Whoever reads the pipe may take their time, and nothing else waits for that.
struct Writing {
    ended: JoinHandle<io::Result<()>>,
    seqs: Vec<Seq>,
}

impl StdoutSink {
    /// Writes to the standard output of the process.
    #[must_use]
    pub fn new() -> Self {
        Self::to(std::io::stdout())
    }

    /// Writes to any writer.
    pub fn to(out: impl Write + Send + 'static) -> Self {
        Self {
            out: Arc::new(Mutex::new(Box::new(out))),
            buffer: Vec::new(),
            handed_over: Vec::new(),
            writing: None,
            prepared: HashSet::new(),
        }
    }

    /// Begins to write what is collected.
    fn write(&mut self) -> Writing {
        let (out, lines) = (self.out.clone(), std::mem::take(&mut self.buffer));
        Writing {
            ended: spawn_blocking(move || {
                let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
                out.write_all(&lines)?;
                out.flush()
            }),
            seqs: std::mem::take(&mut self.handed_over),
        }
    }
}

impl Default for StdoutSink {
    fn default() -> Self {
        Self::new()
    }
}

impl Sink for StdoutSink {
    async fn open(&mut self) -> Result<(), SinkError> {
        self.close().await;
        match self.writing {
            Some(_) => Err(SinkError("nobody reads the standard output".to_owned())),
            None => Ok(()),
        }
    }

    async fn close(&mut self) {
        self.buffer.clear();
        self.handed_over.clear();
        self.prepared.clear();
        if let Some(Writing { ended, .. }) = &mut self.writing
            // It can't be taken back, and must not come after what follows.
            && timeout(OLD_LINES_MAX, ended).await.is_ok()
        {
            self.writing = None;
        }
    }

    async fn check(&mut self) -> Result<(), SinkError> {
        Ok(())
    }

    fn look_up(&mut self, topics: Vec<String>) -> LookUp {
        let known = |topic| (topic, Ok(Known::default()));
        Box::pin(std::future::ready(topics.into_iter().map(known).collect()))
    }

    fn learn(
        &mut self,
        topic: &str,
        answer: Result<Known, NotPrepared>,
    ) -> Result<(), NotPrepared> {
        answer?;
        self.prepared.insert(topic.to_owned());
        Ok(())
    }

    fn hand_over(&mut self, seq: Seq, record: &Record<'_>) -> Result<(), Refused> {
        if !self.prepared.contains(&*record.topic) {
            return Err(Refused::Unprepared);
        }
        if self.buffer.len() >= BUFFER_BYTES {
            return Err(Refused::Full);
        }
        let line = json!({
            "topic": record.topic,
            "key": record.key.as_deref().map(readable),
            "timestamp_ms": record.timestamp_ms,
            "headers": record
                .headers
                .iter()
                .map(|(name, value)| (name.to_string(), value.as_deref().map_or(Value::Null, readable)))
                .collect::<Map<_, _>>(),
            "value": record.value.as_deref().map(readable),
        });
        self.buffer.extend_from_slice(line.to_string().as_bytes());
        self.buffer.push(b'\n');
        self.handed_over.push(seq);
        Ok(())
    }

    async fn receipts(&mut self, into: &mut Vec<Receipt>) -> Result<(), SinkError> {
        if self.writing.is_none() {
            if self.handed_over.is_empty() {
                return std::future::pending().await;
            }
            self.writing = Some(self.write());
        }
        let Some(Writing { ended, .. }) = &mut self.writing else {
            return std::future::pending().await;
        };
        let ended = ended.await.unwrap_or_else(|error| Err(error.into()));
        let seqs = self.writing.take().map(|writing| writing.seqs);
        ended.map_err(|error| SinkError(format!("write to the standard output: {error}")))?;
        into.extend(seqs.into_iter().flatten().map(Receipt::Delivered));
        Ok(())
    }

    fn trouble(&self) -> Option<String> {
        None
    }
}

/// The bytes as text, or, where they are none, in base64.
fn readable(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => Value::from(text),
        Err(_) => json!({ "base64": BASE64_STANDARD.encode(bytes) }),
    }
}
