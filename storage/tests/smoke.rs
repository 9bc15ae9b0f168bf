//! Opening, appending, reopening.
use simpatico_schema::{Event, OverlapMode, Polarity};
use simpatico_storage::{Options, Store, StoreError};

#[test]
fn what_was_appended_is_there_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::open(&path, Options::default()).unwrap();
    for user in ["ada", "ben"] {
        store
            .append(&[Event::new(user, "rustic wood", Polarity::Like)])
            .unwrap();
    }
    assert!(matches!(
        Store::open(&path, Options::default()),
        Err(StoreError::Locked { .. })
    ));
    let similar = store
        .snapshot()
        .similar("ada", 10, OverlapMode::Shared)
        .unwrap();
    assert_eq!(similar.neighbors[0].user, "ben");
    let digest = store.snapshot().digest();
    drop(store);
    let store = Store::open(&path, Options::default()).unwrap();
    assert_eq!(store.snapshot().digest(), digest);
    assert_eq!(store.snapshot().as_of(), 2);
}

#[test]
fn later_events_without_a_time_win_within_a_millisecond() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), Options::default()).unwrap();
    let say = |p| Event::new("ada", "wood", p);
    for _ in 0..20 {
        for p in [
            Polarity::Like,
            Polarity::Dislike,
            Polarity::Clear,
            Polarity::Pass,
            Polarity::Like,
        ] {
            store
                .append_with(
                    &[say(Polarity::Like), say(Polarity::Clear), say(p)],
                    simpatico_storage::Ack::Accepted,
                )
                .unwrap();
            assert_eq!(store.snapshot().registers("ada").unwrap()[0].polarity, p);
        }
    }
}
