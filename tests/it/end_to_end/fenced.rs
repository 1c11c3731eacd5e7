//! A cluster that tells for a while that it has no brokers, as one does whose controller has fenced all of them: after a
//! pause of the machine, or in the course of an upgrade. And one that is only slow.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tokio::time::Instant;

use super::broker::in_flight;
use super::kafka::Kafka;
use super::load::Load;
use super::process::Setup;
use super::services::Own;
use super::{Line, PATIENCE, complete, eventually};
use crate::harness::postgres::TestDatabase;

/// Between a database and a broker of its own, which the relay reaches through the fence and the test without it.
async fn fenced(test: &str) -> Option<(Line, Load, Fence, Own)> {
    let database = TestDatabase::create().await?;
    let own = Own::kafka(test)?;
    let listen = own.variable("KAFKA_PROXY_LISTEN");
    let fence = Fence::start(listen, own.variable("KAFKA_PROXY_UPSTREAM"));
    let kafka = Kafka::new(own.variable("KAFKA_BROKERS").to_owned());
    let load = Load::prepare(&database.options, &kafka).await;
    let mut setup = Setup::new(&database.url);
    setup.kafka(&kafka);
    setup.set("SINK__KAFKA__BROKERS", listen);
    let line = Line {
        database,
        kafka,
        setup,
    };
    Some((line, load, fence, own))
}

/// librdkafka forgets all brokers then, and does not look for any again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_was_told_of_no_brokers_goes_on() {
    let test = "a_relay_that_was_told_of_no_brokers_goes_on";
    let Some((mut line, load, fence, _own)) = fenced(test).await else {
        return;
    };
    line.setup
        .config("[sink.kafka.properties]\n\"topic.metadata.refresh.interval.ms\" = \"100\"");
    let relay = line.ready().await;
    load.write(20).await;
    complete(&load, &line.kafka).await;

    // With nothing to publish.
    fence.raise().await;
    let reason = relay.not_ready(&["brokers"]).await;
    eprintln!("{reason}");
    assert!(!relay.log().contains("begins again"), "{}", relay.log());
    fence.lower();
    relay.ready_again().await;
    load.write(20).await;
    complete(&load, &line.kafka).await;

    // With events in flight.
    let writing = load.start(2);
    writing.commits(20).await;
    fence.raise().await;
    writing.commits(20).await;
    writing.stop().await;
    in_flight(&relay).await;
    relay.not_ready(&["confirmed", "broker"]).await;
    fence.lower();
    let lowered = Instant::now();
    relay.ready_again().await;
    let took = lowered.elapsed();
    let seen = complete(&load, &line.kafka).await;
    eprintln!(
        "after {took:?}: {} duplicates of {} records",
        seen.duplicates, seen.records
    );
    relay.stop().await;
}

/// The answer to whether the client is cut off waits behind the acknowledgement: nobody must take that for an answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_acknowledgement_is_waited_for() {
    let Some((line, load, fence, _own)) = fenced("a_slow_acknowledgement_is_waited_for").await
    else {
        return;
    };
    let relay = line.ready().await;
    load.write(20).await;
    complete(&load, &line.kafka).await;

    fence.0.holds.store(true, SeqCst);
    load.write(20).await;
    in_flight(&relay).await;
    relay.says("confirmed nothing for 24 s").await;
    fence.0.holds.store(false, SeqCst);
    let seen = complete(&load, &line.kafka).await;
    relay.ready().await;
    assert_eq!(seen.duplicates, 0);
    assert!(!relay.log().contains("begins again"), "{}", relay.log());
    relay.stop().await;
}

/// Between clients and a broker, whose answers about the cluster it can strip of the brokers.
struct Fence(Arc<State>);

/// What somebody waits for an answer to.
enum Asked {
    Produce,
    /// In this version.
    Metadata(i16),
}

#[derive(Default)]
struct State {
    up: AtomicBool,
    /// Nothing is acknowledged.
    holds: AtomicBool,
    stripped: AtomicUsize,
    connections: AtomicUsize,
}

impl Fence {
    fn start(listen: &str, upstream: &str) -> Self {
        let listener = TcpListener::bind(listen).unwrap();
        let state = Arc::new(State::default());
        let (seen, upstream) = (state.clone(), upstream.to_owned());
        thread::spawn(move || {
            for client in listener.incoming() {
                let server = TcpStream::connect(&upstream);
                if let (Ok(client), Ok(server)) = (client, server) {
                    connect(&client, &server, &seen);
                }
            }
        });
        Self(state)
    }

    /// Until a client has been told, and nobody is connected any more.
    async fn raise(&self) {
        let before = self.0.stripped.load(SeqCst);
        self.0.up.store(true, SeqCst);
        eventually("clients without brokers", PATIENCE, async || {
            let told = self.0.stripped.load(SeqCst) > before;
            (told && self.0.connections.load(SeqCst) == 0).then_some(())
        })
        .await;
    }

    fn lower(&self) {
        self.0.up.store(false, SeqCst);
    }
}

/// Passes requests and answers on until one of both hangs up.
fn connect(client: &TcpStream, server: &TcpStream, state: &Arc<State>) {
    let asked = Arc::new(Mutex::new(HashMap::new()));
    let streams = || (client.try_clone().unwrap(), server.try_clone().unwrap());
    state.connections.fetch_add(1, SeqCst);
    let (requests, answers) = (asked.clone(), asked);
    let (mut from, mut to) = streams();
    let mut requested = move || -> io::Result<()> {
        loop {
            let frame = read_frame(&mut from)?;
            if let Some((correlation, asked)) = asked_by(&frame) {
                requests.lock().unwrap().insert(correlation, asked);
            }
            write_frame(&mut to, &frame)?;
        }
    };
    let (mut to, mut from) = streams();
    let told = state.clone();
    let mut answered = move || -> io::Result<()> {
        loop {
            let frame = read_frame(&mut from)?;
            let correlation = frame.first_chunk::<4>().expect("a correlation id");
            let asked = answers.lock().unwrap().remove(correlation);
            match asked {
                Some(Asked::Metadata(version)) if told.up.load(SeqCst) => {
                    write_frame(&mut to, &without_brokers(&frame, version))?;
                    told.stripped.fetch_add(1, SeqCst);
                    continue;
                }
                Some(Asked::Produce) => {
                    while told.holds.load(SeqCst) {
                        thread::sleep(Duration::from_millis(10));
                    }
                }
                _ => {}
            }
            write_frame(&mut to, &frame)?;
        }
    };
    let (client, server) = streams();
    let (ended, state) = (streams(), state.clone());
    thread::spawn(move || {
        // An error is the end of the connection.
        let _ = requested();
        let _ = client.shutdown(Shutdown::Both);
        let _ = server.shutdown(Shutdown::Both);
    });
    thread::spawn(move || {
        let _ = answered();
        let _ = ended.0.shutdown(Shutdown::Both);
        let _ = ended.1.shutdown(Shutdown::Both);
        state.connections.fetch_sub(1, SeqCst);
    });
}

fn read_frame(from: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    from.read_exact(&mut frame)?;
    Ok(frame)
}

fn write_frame(to: &mut TcpStream, frame: &[u8]) -> io::Result<()> {
    let length = u32::try_from(frame.len()).unwrap();
    to.write_all(&[&length.to_be_bytes(), frame].concat())
}

/// What a request asks for, with its correlation id.
/// <https://kafka.apache.org/protocol#protocol_messages>
fn asked_by(request: &[u8]) -> Option<([u8; 4], Asked)> {
    let (key, rest) = request.split_first_chunk()?;
    let (version, rest) = rest.split_first_chunk()?;
    let correlation = rest.first_chunk()?;
    let asked = match i16::from_be_bytes(*key) {
        0 => Asked::Produce,
        3 => Asked::Metadata(i16::from_be_bytes(*version)),
        _ => return None,
    };
    Some((*correlation, asked))
}

/// The answer with an empty array of brokers, and with topics that nobody asked for: while librdkafka reads about those,
/// its connections end, and what it has set up to find others it takes back when it has read to the end.
fn without_brokers(answer: &[u8], version: i16) -> Vec<u8> {
    const TOPICS: u32 = 10_000;
    assert!(version >= 12, "version {version} has another format");
    // Correlation id, no tags, throttle time.
    let (head, mut rest) = answer.split_at(4 + 1 + 4);
    for _ in 0..take_length(&mut rest) {
        take(&mut rest, 4); // id
        take_text(&mut rest); // host
        take(&mut rest, 4); // port
        take_text(&mut rest); // rack
        take(&mut rest, 1); // no tags
    }
    let before = rest;
    take_text(&mut rest); // cluster id
    take(&mut rest, 4); // controller
    let between = &before[..before.len() - rest.len()];
    let topics = take_length(&mut rest) + TOPICS;
    let mut stripped = [head, &[1], between, &length(topics)].concat();
    for topic in 0..TOPICS {
        let name = format!("topic-{topic}");
        stripped.extend([0, 0]); // no error
        stripped.extend(length(u32::try_from(name.len()).unwrap()));
        stripped.extend(name.bytes());
        stripped.extend(u128::from(topic + 1).to_be_bytes()); // id
        stripped.extend([0, 1, 0, 0, 0, 0, 0]); // not internal, no partitions, what may be done with it, no tags
    }
    stripped.extend(rest);
    stripped
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(count);
    *bytes = rest;
    taken
}

fn take_text(bytes: &mut &[u8]) {
    let length = take_length(bytes);
    take(bytes, length as usize);
}

/// Written plus one, in groups of seven bits.
fn take_length(bytes: &mut &[u8]) -> u32 {
    let mut read = 0;
    for shift in (0..).step_by(7) {
        let byte = take(bytes, 1)[0];
        read |= u32::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    read.saturating_sub(1)
}

fn length(length: u32) -> Vec<u8> {
    let mut left = length + 1;
    let mut written = Vec::new();
    while left >= 0x80 {
        written.push(u8::try_from(left & 0x7f).unwrap() | 0x80);
        left >>= 7;
    }
    written.push(u8::try_from(left).unwrap());
    written
}
