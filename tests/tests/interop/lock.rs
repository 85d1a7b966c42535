use crate::scene::*;

pub const CASES: &[Case] = &[
    ("lock.signed", &[T], signed),
    ("lock.unsigned", &[T], unsigned),
    ("lock.ours-unsigned", &[T], ours_unsigned),
    ("lock.offline", &[T], offline),
    ("lock.api-only", &[T], api_only),
];

/// A pair in a tailnet that their `gopher` has locked, after signing both.
fn locked() -> (Scene, Ours, Gopher) {
    let scene = Scene::new(T);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    reach(&web, &gopher.addresses);
    gopher.lock();
    tell_all(&scene);
    within(PATIENCE, "the lock is seen", || {
        web.host.log().contains("tailnet lock on=true")
    });
    (scene, web, gopher)
}

/// testcontrol tells nobody of a lock by itself, only with what else has changed.
fn tell_all(scene: &Scene) {
    scene.rename("gopher", "gopher");
}

fn health(web: &Ours) -> String {
    web.node()["health"].to_string()
}

fn signed(_: Server) {
    let (_scene, web, gopher) = locked();
    same_bytes(&web, &gopher, 1_000_000);
    assert_eq!(health(&web), "[]");
}

/// A server alone lets nobody in.
fn unsigned(_: Server) {
    let (scene, web, gopher) = locked();
    let stranger = scene.gopher("stranger", &scene.key(&[]), scene.host());
    within(PATIENCE, "the status says so", || {
        health(&web).contains("stranger.demo.internal are not signed")
    });
    assert!(!passes(&web, stranger.addresses[0]));
    assert!(!passes(&stranger, web.addresses[0]));
    reach(&web, &gopher.addresses[..1]);
    gopher.sign(&stranger.node_key());
    reach(&web, &stranger.addresses);
    same_bytes(&web, &stranger, 1000);
    assert_eq!(health(&web), "[]");
}

/// A node of ours that nobody has signed says how that is done.
fn ours_unsigned(_: Server) {
    let (scene, web, gopher) = locked();
    let db = scene.ours("db", &scene.key(&[]), scene.host());
    let mut said = String::new();
    within(PATIENCE, "the status says so", || {
        said = health(&db);
        said.contains("this node is not signed")
    });
    assert!(!passes(&gopher, db.addresses[0]));
    assert!(!passes(&web, db.addresses[0]));
    let key = said
        .split_whitespace()
        .find(|word| word.starts_with("nodekey:"));
    let key = key.unwrap_or_else(|| panic!("no key in: {said}"));
    gopher.sign(key.trim_matches(|c: char| !c.is_alphanumeric()));
    for address in [gopher.addresses[0], web.addresses[0]] {
        reach(&db, &[address]);
    }
    same_bytes(&db, &gopher, 1000);
    assert_eq!(health(&db), "[]");
}

/// Whom the tailnet trusts is kept, and asked for once.
fn offline(_: Server) {
    let (scene, web, gopher) = locked();
    direct(&web, &gopher);
    let _stranger = scene.gopher("stranger", &scene.key(&[]), scene.host());
    within(PATIENCE, "the stranger is seen", || {
        health(&web).contains("stranger")
    });
    // The map is written to disk a few seconds after it came.
    std::thread::sleep(std::time::Duration::from_secs(6));
    scene.underlay.silence_servers();
    let web = web.restarted().unwrap();
    arrives(&web, &gopher, gopher.addresses[0], 15);
    assert!(health(&web).contains("stranger.demo.internal are not signed"));
}

/// A peer that lock does not cover is there, and no more than that.
fn api_only(_: Server) {
    let (scene, web, gopher) = locked();
    let ingress = scene.gopher("ingress", &scene.key(&[]), scene.host());
    scene.administer("unsigned?node=ingress", "");
    let peers = || web.node()["peers"].to_string();
    within(PATIENCE, "it is in the map", || {
        peers().contains("ingress.demo.internal")
    });
    assert!(!passes(&ingress, web.addresses[0]), "it was let in");
    same_bytes(&web, &gopher, 1000);
    assert_eq!(health(&web), "[]");
}
