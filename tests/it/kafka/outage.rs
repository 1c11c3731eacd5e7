//! A broker that goes away and comes back: nothing is lost, reordered or rejected, and nobody has to help.

use std::time::Duration;

use outbox_relay::event::{Record, Seq};
use outbox_relay::sink::kafka::{KafkaSink, Settings};
use outbox_relay::sink::{Receipt, Refused, Sink};
use tokio::time::{Instant, sleep, timeout};

use super::cluster::{
    LONG, OwnBroker, assert_complete_and_in_order, consume, delivered, open, opened, publish,
    record, settings, topic,
};

const RECORDS: u64 = 20_000;
const COUNT: usize = 20_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_killed_in_the_middle_costs_nothing_but_time() {
    const TEST: &str = "kafka::outage::a_broker_killed_in_the_middle_costs_nothing_but_time";
    let Some(mut broker) = OwnBroker::start(TEST).await else {
        return;
    };
    let brokers = broker.brokers().to_owned();
    let topic = topic("killed");
    let mut sink = opened(short_queue(&brokers), &[&topic]).await;
    let mut receipts = Vec::new();
    let handed_over = hand_over_until(&mut sink, &topic, 0, &mut receipts, COUNT / 4).await;
    broker.signal("KILL");
    // More is handed over, as far as there is room; nothing is refused and nothing gives up.
    let down = Instant::now();
    let mut seq = handed_over;
    while down.elapsed() < Duration::from_secs(3) {
        match sink.hand_over(Seq(seq), &numbered(&topic, seq)) {
            Ok(()) => seq += 1,
            Err(Refused::Full) => {
                let wait = Duration::from_millis(50);
                if let Ok(received) = timeout(wait, sink.receipts(&mut receipts)).await {
                    received.expect("an outage is not the end");
                }
            }
            Err(refused) => panic!("{refused:?}"),
        }
        if seq == RECORDS {
            sleep(Duration::from_millis(50)).await;
            break;
        }
    }
    let trouble = wait_for_trouble(&sink).await;
    eprintln!("{} of {seq} confirmed, trouble: {trouble}", receipts.len());
    assert!(receipts.len() < COUNT, "it was quicker than the kill");
    broker.start_again();
    let up = Instant::now();
    hand_over_until(&mut sink, &topic, seq, &mut receipts, COUNT).await;
    eprintln!(
        "first receipt {:?} after the broker is back",
        first_receipt(&mut sink, &mut receipts, up).await
    );
    delivered(&mut sink, &mut receipts, COUNT).await;
    eprintln!("all receipts {:?} after the broker is back", up.elapsed());
    assert_eq!(sink.trouble(), None);
    let arrived = consume(&brokers, &topic).await;
    assert_complete_and_in_order(&arrived, RECORDS);
    assert_eq!(arrived.len(), COUNT, "each of them once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_hangs_costs_nothing_but_time() {
    const TEST: &str = "kafka::outage::a_broker_that_hangs_costs_nothing_but_time";
    let Some(broker) = OwnBroker::start(TEST).await else {
        return;
    };
    let brokers = broker.brokers().to_owned();
    let topic = topic("hangs");
    let mut sink = opened(short_queue(&brokers), &[&topic]).await;
    let mut receipts = Vec::new();
    let handed_over = hand_over_until(&mut sink, &topic, 0, &mut receipts, 5_000).await;
    broker.signal("STOP");
    let error = nobody_answers(&mut sink).await;
    eprintln!("{error}");
    let late = timeout(Duration::from_secs(5), async {
        loop {
            sink.receipts(&mut receipts)
                .await
                .expect("an outage is not the end");
        }
    });
    late.await.expect_err("a loop");
    broker.signal("CONT");
    let up = Instant::now();
    hand_over_until(&mut sink, &topic, handed_over, &mut receipts, COUNT).await;
    delivered(&mut sink, &mut receipts, COUNT).await;
    eprintln!("all receipts {:?} after the broker goes on", up.elapsed());
    sink.check().await.expect("somebody answers");
    let arrived = consume(&brokers, &topic).await;
    assert_complete_and_in_order(&arrived, RECORDS);
    assert_eq!(arrived.len(), COUNT, "each of them once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_down_at_first_is_found_when_it_comes() {
    const TEST: &str = "kafka::outage::a_broker_that_is_down_at_first_is_found_when_it_comes";
    let Some(mut broker) = OwnBroker::start(TEST).await else {
        return;
    };
    let brokers = broker.brokers().to_owned();
    broker.stop();
    let mut sink = KafkaSink::new(settings(&brokers));
    sink.open().await.expect("opening needs nobody");
    let error = nobody_answers(&mut sink).await;
    assert!(error.contains("connection refused"), "{error}");
    broker.start_again();
    let up = Instant::now();
    timeout(LONG, async { while sink.check().await.is_err() {} })
        .await
        .expect("somebody answers");
    eprintln!("check() works {:?} after the broker is there", up.elapsed());
    let topic = topic("late");
    open(&mut sink, &[&topic]).await;
    publish(&mut sink, &[record(&topic, b"a", b"1")]).await;
    assert_eq!(sink.trouble(), None);
}

/// Opening, closing and dropping must not hold up the thread that runs the loop, whether a broker answers or not.
#[tokio::test]
async fn beginning_and_ending_a_life_takes_no_time() {
    const TEST: &str = "kafka::outage::beginning_and_ending_a_life_takes_no_time";
    let Some(brokers) = super::cluster::brokers(TEST) else {
        return;
    };
    for brokers in [brokers.as_str(), "127.0.0.1:1"] {
        let (mut first, mut next, mut dropped) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..4 {
            let mut sink = KafkaSink::new(settings(brokers));
            for opened in [&mut first, &mut next] {
                let began = Instant::now();
                sink.open().await.expect("open");
                opened.push(began.elapsed());
                drop(sink.check().await);
            }
            let began = Instant::now();
            drop(sink);
            dropped.push(began.elapsed());
        }
        eprintln!("at {brokers}: opened {first:?}, again {next:?}, dropped {dropped:?}");
        // The quickest of several: what waits for a broker does so each time, what waits for the machine does not.
        for took in [first, next, dropped] {
            assert!(took.iter().min() < Some(&Duration::from_millis(200)));
        }
    }
    let topic = topic("quick");
    let mut sink = KafkaSink::new(settings(&brokers));
    for life in 0..8 {
        let began = Instant::now();
        sink.open().await.expect("open");
        sink.check().await.expect("somebody answers");
        eprintln!("life {life}: checked {:?}", began.elapsed());
        sink.prepare(&topic).await.expect("prepared");
        eprintln!("life {life}: prepared {:?}", began.elapsed());
        publish(&mut sink, &[record(&topic, b"a", b"1")]).await;
        eprintln!("life {life}: delivered {:?}", began.elapsed());
    }
}

/// Hands records over, from this one on, until so many are confirmed, or all are handed over.
async fn hand_over_until(
    sink: &mut KafkaSink,
    topic: &str,
    from: u64,
    receipts: &mut Vec<Receipt>,
    confirmed: usize,
) -> u64 {
    timeout(LONG, async {
        let mut seq = from;
        while seq < RECORDS && receipts.len() < confirmed {
            match sink.hand_over(Seq(seq), &numbered(topic, seq)) {
                Ok(()) => seq += 1,
                Err(Refused::Full) => sink.receipts(receipts).await.expect("receipts"),
                Err(refused) => panic!("{refused:?}"),
            }
            if seq.is_multiple_of(1_000) {
                drop(timeout(Duration::from_millis(5), sink.receipts(receipts)).await);
            }
        }
        seq
    })
    .await
    .expect("in time")
}

/// What `check` says, within its own limit or not much later.
async fn nobody_answers(sink: &mut KafkaSink) -> String {
    let checked = timeout(LONG, sink.check()).await.expect("in time");
    checked.expect_err("nobody answers").to_string()
}

async fn first_receipt(
    sink: &mut KafkaSink,
    receipts: &mut Vec<Receipt>,
    since: Instant,
) -> Duration {
    if receipts.len() < COUNT {
        timeout(LONG, sink.receipts(receipts))
            .await
            .expect("in time")
            .expect("receipts");
    }
    since.elapsed()
}

async fn wait_for_trouble(sink: &KafkaSink) -> String {
    timeout(LONG, async {
        loop {
            if let Some(trouble) = sink.trouble() {
                return trouble;
            }
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("trouble")
}

/// Much shorter than what is published.
fn short_queue(brokers: &str) -> Settings {
    Settings {
        queue_records: 2_000,
        ..settings(brokers)
    }
}

fn numbered(topic: &str, number: u64) -> Record<'_> {
    Record {
        key: Some(format!("key-{}", number % 101).into_bytes().into()),
        value: Some(number.to_string().into_bytes().into()),
        ..record(topic, b"", b"")
    }
}
