//! Every bad history is found, and every history that only looks bad is not.

use uuid::Uuid;

use super::*;
use crate::verify::expect::Emitted;

/// A log of one topic `order` with two partitions, and what a consumer reads there.
struct Story {
    terms: Terms,
    config: &'static str,
    parked: Vec<(i64, Uuid)>,
    dropped: Vec<(i64, Uuid)>,
    retained: Retained,
    topic: Topic,
    log: Vec<Emitted>,
}

fn event(id: i64, entity: &str) -> Emitted {
    Emitted {
        id,
        event_id: Uuid::from_u128(id.cast_unsigned().into()),
        aggregate_type: "order".to_owned(),
        aggregate_id: entity.to_owned(),
        event_type: "changed".to_owned(),
        payload: Some(format!("{{\"n\": {id}}}")),
        payload_bytes: None,
        headers: None,
        settled: true,
    }
}

/// Entities of one partition, and one of the other.
const A: &str = "1";
const B: &str = "0";

fn home(entity: &str) -> i32 {
    i32::try_from(partition_of(entity.as_bytes(), 2)).unwrap()
}

impl Story {
    /// Events 1 to n, in turn of the two entities.
    fn of(events: i64) -> Self {
        Self {
            terms: Terms {
                in_flight_events: 100,
                from_earliest: true,
                duplicates_allowed: true,
                from_id: i64::MIN,
            },
            config: "",
            parked: Vec::new(),
            dropped: Vec::new(),
            retained: Retained {
                first: Some(1),
                gone: Vec::new(),
            },
            topic: Topic {
                name: "order".to_owned(),
                compacted: false,
                partitions: vec![
                    Partition {
                        start: 0,
                        end: 1000,
                        truncated: false,
                    };
                    2
                ],
            },
            log: (1..=events)
                .map(|id| event(id, if id % 2 == 0 { A } else { B }))
                .collect(),
        }
    }

    fn faultless(&self) -> Vec<Emitted> {
        self.log.clone()
    }

    /// What is found when these records are read.
    fn judge(self, records: &[Emitted]) -> PipelineReport {
        let rules = crate::verify::expect::tests::rules(self.config);
        let mut judge = Judge::new(
            self.terms,
            rules.clone(),
            Vec::new(),
            SetAside::new(self.parked, self.dropped),
            &[self.topic],
        );
        self.log.iter().for_each(|event| judge.event(event));
        judge.retained(self.retained);
        for (offset, record) in (0..).zip(records) {
            let seen = Seen {
                identity: Some(Identity {
                    event_id: record.event_id,
                    sequence: record.id,
                }),
                key: Fingerprint::of(Some(record.aggregate_id.as_bytes())),
                value: rules.value(record),
            };
            judge.record(0, home(&record.aggregate_id), offset, &seen);
        }
        judge.verdict()
    }
}

/// Missing, out of order, altered, unknown, doubled.
fn counts(report: &PipelineReport) -> [u64; 5] {
    [
        report.missing.count,
        report.out_of_order.count,
        report.altered.count,
        report.unknown.count,
        report.doubled.count,
    ]
}

const NOTHING: [u64; 5] = [0; 5];

#[test]
fn a_faultless_history_holds() {
    let story = Story::of(10);
    let records = story.faultless();
    let report = story.judge(&records);
    assert!(report.holds);
    assert_eq!(counts(&report), NOTHING);
    assert_eq!((report.events, report.records, report.found), (10, 10, 10));
}

#[test]
fn a_missing_event_is_found() {
    let story = Story::of(10);
    let mut records = story.faultless();
    records.remove(4);
    let report = story.judge(&records);
    assert!(!report.holds);
    assert_eq!(counts(&report), [1, 0, 0, 0, 0]);
    assert_eq!(report.missing.examples[0].sequence, Some(5));
}

#[test]
fn a_topic_that_does_not_exist_holds_nothing() {
    let story = Story {
        config: "topic = \"elsewhere\"",
        ..Story::of(3)
    };
    let report = story.judge(&[]);
    assert_eq!(counts(&report), [3, 0, 0, 0, 0]);
    let what = report.missing.examples[0].what;
    assert_eq!(what, Some("its topic does not exist"));
}

#[test]
fn what_is_not_settled_or_parked_is_not_missing() {
    let mut story = Story::of(10);
    story.log[9].settled = false;
    let uuid = |id: i64| Uuid::from_u128(id.cast_unsigned().into());
    // Of event 3 the id came again: what is parked under it is another one, and no word about it.
    story.parked = vec![(3, uuid(30)), (5, uuid(5))];
    let mut records = story.faultless();
    records.remove(9);
    records.remove(4);
    records.remove(2);
    let report = story.judge(&records);
    assert_eq!(counts(&report), [1, 0, 0, 0, 0]);
    assert_eq!(report.missing.examples[0].sequence, Some(3));
    assert_eq!((report.waiting, report.parked, report.found), (1, 2, 7));
}

#[test]
fn what_an_operator_dropped_is_not_missing_and_what_has_its_id_only_is() {
    let mut story = Story::of(10);
    let mut records = story.faultless();
    let uuid = |id: i64| Uuid::from_u128(id.cast_unsigned().into());
    records.retain(|record| ![3, 5, 7].contains(&record.id));
    // Of event 5 the id came again after a failover; 9 was published after all; 12 is retained no more.
    story.dropped = vec![
        (3, uuid(3)),
        (5, uuid(50)),
        (5, uuid(51)),
        (9, uuid(9)),
        (12, uuid(12)),
    ];
    records.push(event(12, A));
    let report = story.judge(&records);
    assert_eq!(counts(&report), [2, 0, 0, 0, 0]);
    let missing = report.missing.examples.iter();
    assert_eq!(
        missing.map(|e| e.sequence).collect::<Vec<_>>(),
        [Some(5), Some(7)]
    );
    assert_eq!((report.dropped, report.found), (1, 7));
    assert_eq!(report.not_judged.records_beyond_the_log, 1);
}

#[test]
fn an_event_that_was_parked_and_is_found_is_found() {
    let mut story = Story::of(10);
    // The second is older than what is retained.
    let uuid = |id: i64| Uuid::from_u128(id.cast_unsigned().into());
    story.parked = vec![(-3, uuid(-3)), (5, uuid(5))];
    let records = story.faultless();
    let report = story.judge(&records);
    assert_eq!((report.parked, report.found), (1, 10));
}

#[test]
fn swapped_events_of_an_entity_are_found() {
    let story = Story::of(10);
    let mut records = story.faultless();
    records.swap(2, 4);
    let report = story.judge(&records);
    assert!(!report.holds);
    assert_eq!(counts(&report), [0, 1, 0, 0, 0]);
    let example = &report.out_of_order.examples[0];
    assert_eq!((example.sequence, example.offset), (Some(3), Some(4)));
}

#[test]
fn entities_have_no_order_among_each_other() {
    let story = Story::of(10);
    let mut records = story.faultless();
    records.swap(2, 3);
    assert!(story.judge(&records).holds);
}

#[test]
fn the_first_delivery_counts_for_the_order() {
    let story = Story::of(6);
    let records = story.faultless();
    let again: Vec<Emitted> = [&records[..4], &records[2..]].concat();
    let report = story.judge(&again);
    assert!(report.holds);
    assert_eq!(counts(&report), [0, 0, 0, 0, 2]);
}

#[test]
fn a_crash_explains_a_run_of_duplicates() {
    let story = Story::of(10);
    let records = story.faultless();
    let again = [&records[..6], &records[2..8], &records[4..]].concat();
    let report = story.judge(&again);
    assert!(report.holds);
    let doubled = &report.doubled;
    // Two partitions, two crashes.
    assert_eq!(
        (doubled.count, doubled.runs, doubled.longest_run),
        (8, 4, 2)
    );
    assert_eq!(doubled.beyond_reach, 0);
}

#[test]
fn a_replay_is_told_from_a_crash() {
    let mut story = Story::of(10);
    story.terms.in_flight_events = 3;
    let records = story.faultless();
    let again = [&records[..], &records[..4]].concat();
    let report = story.judge(&again);
    assert!(report.holds);
    assert_eq!((report.doubled.count, report.doubled.beyond_reach), (4, 4));
}

#[test]
fn a_duplicate_is_a_broken_promise_where_there_must_be_none() {
    let mut story = Story::of(10);
    story.terms.duplicates_allowed = false;
    let mut records = story.faultless();
    records.push(records[9].clone());
    let report = story.judge(&records);
    assert!(!report.holds);
    assert_eq!(counts(&report), [0, 0, 0, 0, 1]);
}

#[test]
fn an_altered_event_is_found() {
    type Alter = fn(&mut Emitted);
    let alterations: [(Alter, &str); 2] = [
        (
            |e| e.payload = Some("{}".to_owned()),
            "the payload is another",
        ),
        (|e| e.aggregate_id = "5".to_owned(), "the key is another"),
    ];
    for (alter, what) in alterations {
        let story = Story::of(10);
        let mut records = story.faultless();
        alter(&mut records[6]);
        let report = story.judge(&records);
        assert!(!report.holds);
        assert_eq!(counts(&report), [0, 0, 1, 0, 0], "{what}");
        assert_eq!(report.altered.examples[0].what, Some(what));
    }
}

#[test]
fn what_the_filter_leaves_out_does_not_belong_in_the_topic() {
    let story = Story {
        config: "filter.event_types = [\"changed\"]",
        ..Story::of(3)
    };
    let mut story = story;
    story.log[1].event_type = "secret".to_owned();
    let records = story.faultless();
    let report = story.judge(&records);
    assert_eq!(counts(&report), [0, 0, 1, 0, 0]);
    assert_eq!((report.events, report.found), (2, 2));
}

#[test]
fn an_event_that_was_never_committed_is_found() {
    let story = Story::of(10);
    let mut records = story.faultless();
    records.insert(3, event(77, A));
    let report = story.judge(&records);
    assert!(!report.holds);
    assert_eq!(counts(&report), [0, 0, 0, 1, 0]);
    assert_eq!(report.unknown.examples[0].sequence, Some(77));
}

#[test]
fn another_event_in_the_place_of_one_is_found() {
    let story = Story::of(10);
    let mut records = story.faultless();
    records[3].event_id = Uuid::from_u128(99);
    assert_eq!(counts(&story.judge(&records)), [1, 0, 0, 1, 0]);
}

#[test]
fn what_the_log_no_longer_has_is_not_unknown() {
    let mut story = Story::of(20);
    let records = story.faultless();
    story.log.drain(..5);
    story.log.retain(|event| !(10..13).contains(&event.id));
    story.retained = Retained {
        first: Some(6),
        gone: vec![(10, 13)],
    };
    let report = story.judge(&records);
    assert!(report.holds);
    assert_eq!(report.not_judged.records_beyond_the_log, 8);
    assert_eq!(report.found, 12);
}

#[test]
fn what_the_topic_no_longer_has_is_not_missing() {
    let mut story = Story::of(20);
    let mut records = story.faultless();
    records.drain(..10);
    for partition in &mut story.topic.partitions {
        partition.truncated = true;
    }
    let report = story.judge(&records);
    assert!(report.holds);
    assert_eq!(
        (report.not_judged.events_beyond_the_topic, report.found),
        (10, 10)
    );
}

#[test]
fn a_partition_that_is_whole_is_judged_whatever_became_of_others() {
    let mut story = Story::of(20);
    let mut records = story.faultless();
    records.drain(..10);
    assert_ne!(home(A), home(B));
    story.topic.partitions[usize::try_from(home(A)).unwrap()].truncated = true;
    let report = story.judge(&records);
    assert_eq!(counts(&report), [5, 0, 0, 0, 0]);
    assert_eq!(report.not_judged.events_beyond_the_topic, 5);
}

#[test]
fn a_partition_that_let_go_of_everything_proves_nothing() {
    let mut story = Story::of(4);
    for partition in &mut story.topic.partitions {
        *partition = Partition {
            start: 9,
            end: 9,
            truncated: true,
        };
    }
    let report = story.judge(&[]);
    assert!(report.holds);
    assert_eq!(report.not_judged.events_beyond_the_topic, 4);
}

#[test]
fn a_repetition_whose_first_time_is_gone_is_not_out_of_order() {
    // 1 3 5 | 3 5 7, of which the first two are gone.
    let again = [5, 3, 5, 7].map(|id| event(id, B));
    let story = |truncated| {
        let mut story = Story::of(7);
        story.log.retain(|event| event.aggregate_id == B);
        for partition in &mut story.topic.partitions {
            partition.truncated = truncated;
        }
        story
    };
    assert_eq!(story(true).judge(&again).out_of_order.count, 0);
    assert_eq!(story(false).judge(&again).out_of_order.count, 1);
    // Without the repetition nothing explains it.
    let swapped = [5, 3, 7].map(|id| event(id, B));
    assert_eq!(story(true).judge(&swapped).out_of_order.count, 1);
}

#[test]
fn compaction_keeps_the_newest_of_each_key() {
    let compacted = || {
        let mut story = Story::of(10);
        story.topic.compacted = true;
        story
    };
    let records = compacted().faultless();
    let report = compacted().judge(&records[8..]);
    assert!(report.holds);
    assert_eq!(report.not_judged.events_compacted, 8);
    // The newest itself has to be there.
    let report = compacted().judge(&records[..9]);
    assert_eq!(counts(&report), [1, 0, 0, 0, 0]);
    // Unless it deletes its key.
    let mut story = compacted();
    story.log[9].payload = None;
    assert_eq!(counts(&story.judge(&records[..9])), NOTHING);
}

#[test]
fn what_was_before_the_start_is_not_missing() {
    let mut story = Story::of(10);
    story.terms.from_earliest = false;
    let records = story.faultless();
    let report = story.judge(&records[6..]);
    assert!(report.holds);
    assert_eq!(report.not_judged.events_before_the_start, 6);
    let mut story = Story::of(10);
    story.terms.from_earliest = false;
    let report = story.judge(&[&records[6..8], &records[9..]].concat());
    assert_eq!(counts(&report), [1, 0, 0, 0, 0]);
    // A replay has brought one of the old ones.
    let mut story = Story::of(10);
    story.terms.from_earliest = false;
    let report = story.judge(&[&records[6..], &records[..1]].concat());
    assert!(report.holds);
    assert_eq!(report.not_judged.events_before_the_start, 5);
}

#[test]
fn older_records_than_those_asked_for_are_left_alone() {
    let mut story = Story::of(10);
    story.terms.from_id = 6;
    let records = story.faultless();
    story.log.drain(..5);
    let report = story.judge(&records);
    assert!(report.holds);
    assert_eq!((report.records, report.found), (5, 5));
}

#[test]
fn pipelines_that_share_a_topic_do_not_accuse_each_other() {
    let own = crate::verify::expect::tests::rules("filter.event_types = [\"changed\"]");
    let other = crate::verify::expect::tests::rules("format = \"cloudevents_json\"");
    let story = Story::of(4);
    let mut judge = Judge::new(
        story.terms,
        own.clone(),
        vec![other],
        SetAside::default(),
        &[story.topic],
    );
    let mut foreign = event(5, A);
    foreign.event_type = "of the other".to_owned();
    let events = [&story.log[..], &[foreign]].concat();
    for event in &events {
        judge.event(event);
    }
    judge.retained(story.retained);
    for (offset, event) in (0..).zip(events.iter().chain(&events[..2])) {
        let (id, sequence) = (event.event_id.to_string(), event.id.to_string());
        let header = |name: &str| match name {
            "id" => Some(id.as_bytes()),
            "sequence" => Some(sequence.as_bytes()),
            _ => None,
        };
        let (key, value) = (event.aggregate_id.as_bytes(), event.payload.as_deref());
        let seen = judge.recognise(header, Some(key), value.map(str::as_bytes));
        judge.record(0, home(&event.aggregate_id), offset, &seen);
    }
    // In the format of the other one.
    let value = format!(
        "{{\"id\":\"{}\",\"sequence\":\"1\",\"data\":1}}",
        events[0].event_id
    );
    let seen = judge.recognise(|_| None, Some(A.as_bytes()), Some(value.as_bytes()));
    judge.record(0, home(A), 7, &seen);
    let report = judge.verdict();
    assert_eq!(counts(&report), NOTHING);
    assert_eq!(report.not_judged.records_of_other_pipelines, 4);
    assert_eq!(report.found, 4);
}

#[test]
fn every_loss_and_every_swap_in_a_random_history_is_found() {
    for seed in 0..200 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut story = Story::of(60);
        for event in &mut story.log {
            event.aggregate_id = random.u8(1..=4).to_string();
        }
        let records = story.faultless();
        let (lost, later) = (random.usize(..30), random.usize(30..60));
        let mut spoilt = records.clone();
        let swapped = random.bool();
        let expected = if swapped {
            spoilt.swap(lost, later);
            let same_entity = |n: usize| records[n].aggregate_id == records[lost].aggregate_id;
            same_entity(later).then_some([0, 1, 0, 0, 0])
        } else {
            spoilt.remove(lost);
            Some([1, 0, 0, 0, 0])
        };
        let report = story.judge(&spoilt);
        if let Some([missing, out_of_order, ..]) = expected {
            assert_eq!(report.missing.count, missing, "seed {seed}");
            assert!(report.out_of_order.count >= out_of_order, "seed {seed}");
            assert!(!report.holds, "seed {seed}");
        }
    }
}

#[test]
fn an_event_takes_as_much_memory_as_is_said() {
    assert_eq!(size_of::<Entry>(), 48);
}
