//! `parked` and `acts`: what operators see of rejected events, and what they are told of what they ask for.

use serde_json::Value;

use super::Ran;
use super::pipelines::both;

#[tokio::test]
async fn parked_events_are_grouped_listed_named_and_watched() {
    both(
        "parked_events_are_grouped_listed_named_and_watched",
        async |world| {
            let daemon = world.start(&[]);
            for entity in ["1", "1", "1", "2"] {
                world.emit_of("big order", entity).await;
            }
            world
                .until("four parked events", async || {
                    let listed = world.json(&["parked", "list", "--waiting"]).await;
                    listed["events"].as_array().unwrap().len() == 4
                })
                .await;
            let causes = world.json(&["parked", "list", "--by", "error"]).await;
            assert_eq!(causes.as_array().unwrap().len(), 1, "{causes:#}");
            let cause = &causes[0];
            // Two of them only wait.
            assert_eq!(
                (&cause["events"], &cause["entities"]),
                (&2.into(), &2.into())
            );
            assert_eq!(cause["example_id"], 1);
            let Ran { out, .. } = world
                .ends_with(0, &["parked", "list", "--by", "error"])
                .await;
            assert!(
                out.contains("EVENTS") && out.contains("the topic name has the character"),
                "{out}"
            );
            let listed = world.json(&["parked", "list"]).await;
            assert_eq!(listed["events"].as_array().unwrap().len(), 2);
            let Ran { out, .. } = world.ends_with(0, &["parked", "list", "--waiting"]).await;
            assert!(
                out.contains("entity waits") && out.contains(" waits "),
                "{out}"
            );

            let drop = ["parked", "drop", "1", "--reason", "x", "--dry-run"];
            let Ran { out, .. } = world.ends_with(0, &drop).await;
            let told =
                "dry run: 1 event would be dropped, and 2 events behind them published, in order";
            assert!(out.contains(told), "{out}");
            let all = [&drop[..], &["--with-waiting"]].concat();
            let Ran { out, .. } = world.ends_with(0, &all).await;
            let told = "dry run: 1 event would be dropped, and 2 events behind them too";
            assert!(out.contains(told), "{out}");

            // By its uuid as well.
            let uuid = listed["events"][0]["event_id"].as_str().unwrap();
            let shown = world.json(&["parked", "show", uuid]).await;
            assert_eq!(shown["id"], 1);
            let again = [
                "parked",
                "redrive",
                uuid,
                "--wait",
                "--reason",
                "another try",
            ];
            let Ran { out, .. } = world.ends_with(3, &again).await;
            assert!(out.contains("1 event rejected again"), "{out}");
            let gone = [
                "parked",
                "drop",
                uuid,
                "--with-waiting",
                "--reason",
                "given up",
            ];
            world.ends_with(0, &gone).await;
            world
                .until("one parked event", async || {
                    let listed = world.json(&["parked", "list", "--waiting"]).await;
                    listed["events"].as_array().unwrap().len() == 1
                })
                .await;
            let ran = world.ends_with(2, &["parked", "redrive"]).await;
            assert!(ran.err.contains("say which events"), "{}", ran.err);
            world.ends_with(2, &["replay", "start"]).await;
            world
                .ends_with(2, &["replay", "start", "--all", "--pipeline", "none"])
                .await;

            world.emit(&["7"]).await;
            world.until_keys(&["7"]).await;
            world
                .until("the position", async || {
                    let seen = world.json(&["status"]).await;
                    seen["books"]["pipelines"][0]["last_id"] == 5
                })
                .await;
            let replay = [
                "replay",
                "start",
                "--entity",
                "order/7",
                "--reason",
                "asked by the team",
            ];
            world.ends_with(0, &replay).await;
            let acts = world.json(&["acts"]).await;
            let noted = |act: &Value| {
                let text = |name: &str| act[name].as_str().unwrap_or("-").to_owned();
                (text("action"), text("selector"), text("reason"))
            };
            let (action, selector, reason) = noted(&acts[0]);
            assert_eq!((&action[..], &reason[..]), ("replay", "asked by the team"));
            assert_eq!(selector, "replay 1: entity order/7");
            assert_eq!(noted(&acts[1]).0, "drop");
            let Ran { out, .. } = world.ends_with(0, &["replay", "list"]).await;
            assert!(out.contains("entity order/7"), "{out}");
            std::mem::drop(daemon);
        },
    )
    .await;
}
