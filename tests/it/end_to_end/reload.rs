//! The configuration changes while the relay runs.

use super::{Line, PATIENCE, eventually, run};

const ORDERS: &str = "[pipeline.filter]\naggregate_types = [\"order\"]\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filters_and_the_log_level_are_taken_over_and_the_rest_is_refused() {
    let test =
        "end_to_end::reload::filters_and_the_log_level_are_taken_over_and_the_rest_is_refused";
    let Some(mut line) = Line::create(test).await else {
        return;
    };
    // From the file, not from the environment, which wins over it.
    line.setup.unset("LOG__LEVEL");
    line.setup
        .config(&format!("{ORDERS}[log]\nlevel = \"warn\"\n"));
    line.kafka.create(&["all"]).await;
    let topic = line.kafka.topic("all");
    line.setup.set("PIPELINE__TOPIC", &topic);
    let relay = line.ready().await;
    let pool = line.database.pool.clone();
    let emit = async |what: &str| {
        run(
            &pool,
            format!("select outbox.emit(kind, '1', kind || '.{what}', '{{}}') from unnest(array['order', 'customer']) kind"),
        )
        .await;
    };
    let published = async |count: usize| -> Vec<String> {
        let mut reader = line.kafka.reader(std::slice::from_ref(&topic));
        let mut types = Vec::new();
        eventually("the records", PATIENCE, async || {
            for record in reader.read_to_end().await {
                let name = record.header("type").unwrap_or_default();
                types.push(String::from_utf8_lossy(name).into_owned());
            }
            (types.len() >= count).then_some(())
        })
        .await;
        types
    };

    emit("first").await;
    assert_eq!(published(1).await, ["order.first"]);

    assert!(!relay.log().contains("INFO"), "{}", relay.log());
    // A changed file is enough, and what needs a restart is named.
    line.setup.config(&format!(
        "{}[log]\nlevel = \"info\"\n[relay]\nlease_ttl = \"20s\"\n",
        ORDERS.replace("\"order\"", "\"customer\"")
    ));
    line.setup.write_config();
    relay.says("INFO reloaded the configuration").await;
    relay.says("pipeline.filter.aggregate_types").await;
    relay.says("relay.lease_ttl").await;
    relay.says("need a restart").await;
    emit("second").await;
    assert_eq!(published(2).await, ["order.first", "customer.second"]);

    // What is wrong changes nothing, and is said.
    line.setup
        .config("[pipeline.filter]\naggregate_typos = []\n");
    line.setup.write_config();
    relay.signal("HUP");
    relay.says("aggregate_typos").await;
    emit("third").await;
    assert_eq!(
        published(3).await,
        ["order.first", "customer.second", "customer.third"]
    );
    relay.stop().await;
}
