//! Several pipelines over one outbox.

use super::kafka::Received;
use super::{Line, PATIENCE, eventually, run};

fn keys(records: &[Received]) -> Vec<String> {
    let mut keys: Vec<String> = records
        .iter()
        .map(|record| record.key_text().to_owned())
        .collect();
    keys.sort();
    keys
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipelines_choose_route_and_encode_for_themselves() {
    let Some(mut line) = Line::create("pipelines_choose_route_and_encode_for_themselves").await
    else {
        return;
    };
    line.kafka
        .create(&["all", "order", "cloud", "wrapped", "late"])
        .await;
    let topic = |name| line.kafka.topic(name);
    let config = format!(
        "[pipelines.everything]
         topic = '{}'
         key = '{{aggregate_type}}-{{aggregate_id}}'
         [pipelines.orders]
         topic = '{}'
         filter.aggregate_types = ['order']
         [pipelines.placed]
         topic = '{}'
         filter.event_types = ['placed']
         format = 'cloudevents_binary'
         [pipelines.acme]
         topic = '{}'
         filter.headers.tenant = 'acme'
         format = 'cloudevents_json'
         ",
        topic("all"),
        topic("{aggregate_type}"),
        topic("cloud"),
        topic("wrapped"),
    );
    line.setup.config(&config);
    let pool = &line.database.pool;
    let emit = |id: u8| {
        format!(
            "select outbox.emit('order', '{id}1', 'placed', '{{\"n\": 9007199254740993}}', '{{\"tenant\": \"acme\"}}');
             select outbox.emit('order', '{id}2', 'paid', '2', '{{\"tenant\": \"other\"}}');
             select outbox.emit('customer', '{id}3', 'placed', '3');
             select outbox.emit('customer', '{id}4', 'moved', null, '{{\"tenant\": \"acme\"}}');"
        )
    };
    run(pool, emit(1)).await;
    let relay = line.ready().await;
    let expected = |name, wanted: &'static [&'static str]| {
        let kafka = &line.kafka;
        async move {
            eventually(name, PATIENCE, async || {
                let records = kafka.read(&[name]).await;
                (records.len() >= wanted.len()).then(|| {
                    assert_eq!(keys(&records), wanted, "{name}");
                    records
                })
            })
            .await
        }
    };
    expected(
        "all",
        &["customer-13", "customer-14", "order-11", "order-12"],
    )
    .await;
    expected("order", &["11", "12"]).await;
    let cloud = expected("cloud", &["11", "13"]).await;
    assert_eq!(cloud[0].header("ce_specversion"), Some(&b"1.0"[..]));
    assert_eq!(cloud[0].header("ce_type"), Some(&b"placed"[..]));
    let wrapped = expected("wrapped", &["11", "14"]).await;
    let envelope = wrapped
        .iter()
        .find(|record| record.key_text() == "11")
        .unwrap();
    assert!(
        envelope
            .text()
            .contains(r#""data":{"n": 9007199254740993}"#),
        "{}",
        envelope.text()
    );
    let tombstone = wrapped
        .iter()
        .find(|record| record.key_text() == "14")
        .unwrap();
    assert_eq!(tombstone.value, None);
    relay.stop().await;

    let late = format!(
        "{config}[pipelines.late]\ntopic = '{}'\nstart = 'latest'",
        line.kafka.topic("late")
    );
    line.setup.config(&late);
    let relay = line.ready().await;
    run(pool, emit(2)).await;
    let late = &["21", "22", "23", "24"];
    let records = eventually("late", PATIENCE, async || {
        let records = line.kafka.read(&["late"]).await;
        (records.len() >= late.len()).then_some(records)
    })
    .await;
    assert_eq!(keys(&records), late);
    eventually("eight of all", PATIENCE, async || {
        (line.kafka.read(&["all"]).await.len() == 8).then_some(())
    })
    .await;
    relay.stop().await;
}
