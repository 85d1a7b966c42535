use std::{env, net::IpAddr, thread, time::Duration};

use crate::scene::*;

pub const CASES: &[Case] = &[
    ("life.expired-rejoins", WITH_KEYS, expired_rejoins),
    ("life.expired-asks", WITH_KEYS, expired_asks),
    ("life.expired-peer", ALL, expired_peer),
    ("life.deleted", WITH_KEYS, deleted),
    ("life.renamed", ALL, renamed),
    ("life.logout", WITH_KEYS, logout),
    ("life.logout-peer", WITH_KEYS, logout_peer),
    ("life.server-restart", WITH_KEYS, server_restart),
    ("life.server-away", ALL, server_away),
    ("life.start-offline", ALL, start_offline),
];

/// A key that still opens the door does so when the node's own key expires.
fn expired_rejoins(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    same_bytes(&web, &gopher, 1000);
    let key_of = || gopher.peer("web").map(|peer| peer["PublicKey"].clone());
    let before = key_of();
    scene.expire("web");
    within(30, "the peer hears of the new key", || {
        key_of().is_some_and(|now| Some(now) != before)
    });
    within(5, "the node runs again", || web.state() == "running");
    assert!(
        web.host.log().contains("Expired"),
        "the log does not say so"
    );
    assert_eq!(web.addresses_now(), web.addresses);
    reach(&gopher, &web.addresses);
    same_bytes(&web, &gopher, 1_000_000);
}

/// Where no key opens the door, a person must, and the container runs on.
fn expired_asks(server: Server) {
    let scene = Scene::new(server);
    let web = scene.ours("web", &scene.key(&[]), scene.host());
    let gopher = scene.gopher("gopher", &scene.key(&[]), scene.host());
    same_bytes(&web, &gopher, 1000);
    scene.expire("web");
    let page = web.page("its key has expired");
    within(30, "the peer sends nothing more", || {
        !passes(&gopher, web.addresses[0])
    });
    assert!(!passes(&web, gopher.addresses[0]), "the peer takes packets");
    scene.approve(&page);
    within(30, "the node runs again", || web.state() == "running");
    assert_eq!(web.addresses_now(), web.addresses);
    reach(&gopher, &web.addresses);
    same_bytes(&web, &gopher, 1_000_000);
}

fn expired_peer(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    reach(&web, &gopher.addresses);
    scene.expire("gopher");
    within(30, "we send nothing more", || {
        !passes(&web, gopher.addresses[0])
    });
    assert!(!passes(&gopher, web.addresses[0]), "we take its packets");
    if !matches!(server, T) {
        gopher.join_again(&scene.url(), &scene.key(&[]), "gopher");
        reach(&web, &gopher.addresses);
        same_bytes(&web, &gopher, 1_000_000);
    }
}

fn deleted(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    reach(&web, &gopher.addresses);
    let gone = |web: &Ours| {
        scene.delete("web");
        let page = web.page("deleted");
        within(10, "the peer forgets it", || gopher.peer("web").is_none());
        assert!(!passes(&web.container, gopher.addresses[0]));
        page
    };
    // A person lets it in again, and it may have another address.
    let page = gone(&web);
    scene.approve(&page);
    within(30, "the node runs again", || web.state() == "running");
    reach(&gopher, &web.addresses_now());
    reach(&web, &gopher.addresses);
    // Or the container starts again, and its key opens the door.
    gone(&web);
    let web = web.restarted().unwrap();
    reach(&gopher, &web.addresses);
    same_bytes(&web, &gopher, 1_000_000);
}

fn renamed(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    let resolver = MAGIC_DNS.parse().unwrap();
    scene.rename("web", "shop");
    scene.rename("gopher", "badger");
    let names: [(&Namespace, String, &[IpAddr]); 3] = [
        (&web, "shop".into(), &web.addresses),
        (&web, format!("badger.{DOMAIN}"), &gopher.addresses),
        // Go's client tells no IPv6 address of who has an IPv4 one.
        (&gopher, format!("shop.{DOMAIN}"), &web.addresses[..1]),
    ];
    for (asker, name, addresses) in names {
        within(10, &format!("{name} is resolved"), || {
            asker.resolve(resolver, &name).as_deref() == Ok(addresses)
        });
    }
    assert_eq!(web.node()["name"], format!("shop.{DOMAIN}"));
    for (asker, old) in [(&web as &Namespace, "gopher"), (&gopher, "web")] {
        let answer = asker.resolve(resolver, &format!("{old}.{DOMAIN}"));
        assert!(answer.is_err(), "{old} is still known: {answer:?}");
    }
    same_bytes(&web, &gopher, 1000);
}

fn logout(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    reach(&web, &gopher.addresses);
    web.host.tailnode(&["logout", "web"]).unwrap();
    assert_eq!(web.state(), "stopped");
    let status = web.host.tailnode(&["status"]).unwrap();
    assert!(status.contains("restart the container"), "{status}");
    within(10, "the peer sends nothing more", || {
        !passes(&gopher, web.addresses[0])
    });
    assert!(!passes(&web, gopher.addresses[0]));
    let error = web.host.tailnode(&["logout", "nobody"]).unwrap_err();
    assert!(error.contains("no container called nobody"), "{error}");

    let addresses = web.addresses.clone();
    let web = web.restarted().unwrap();
    assert_eq!(web.addresses, addresses);
    reach(&gopher, &web.addresses);
    same_bytes(&web, &gopher, 1000);
}

fn logout_peer(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    reach(&web, &gopher.addresses);
    gopher.log_out();
    within(30, "we send nothing more", || {
        let peers = web.node()["peers"].clone();
        let peers = peers.as_array().cloned().unwrap_or_default();
        peers.iter().all(|peer| peer["online"] != true)
    });
    assert!(!passes(&web, gopher.addresses[0]));
    gopher.join_again(&scene.url(), &scene.key(&[]), "gopher");
    reach(&web, &gopher.addresses);
    same_bytes(&web, &gopher, 1000);
}

/// The server ends, with its relay, and is started again.
fn server_restart(server: Server) {
    let mut scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    let db = scene.ours("db", &scene.key(&["--reusable"]), scene.host());
    direct(&web, &gopher);
    within(10, "its endpoints are known", || {
        let peer = gopher.peer("db").unwrap_or_default();
        peer["Relay"]
            .as_str()
            .is_some_and(|relay| !relay.is_empty())
    });
    let mut talk = Talk::begin(&web, &gopher, gopher.addresses[0]);
    talk.goes_on(100_000);
    scene.stop_server();
    talk.goes_on(1_000_000);
    // These two have not met.
    arrives(&db, &gopher, gopher.addresses[0], 30);
    talk.goes_on(1_000_000);
    within(30, "the status says so", || web.state() == "offline");
    scene.restart_server();
    talk.goes_on(1_000_000);
    within(60, "the nodes are back", || {
        web.state() == "running" && db.state() == "running"
    });
    scene.rename("gopher", "badger");
    let (resolver, name) = (MAGIC_DNS.parse().unwrap(), format!("badger.{DOMAIN}"));
    within(60, "changes arrive", || {
        web.resolve(resolver, &name).as_ref() == Ok(&gopher.addresses)
    });
    talk.goes_on(1_000_000);
}

/// How long the server is away: in a run that may take its time, `AWAY=600`.
fn away() -> Duration {
    let seconds = env::var("AWAY").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(60))
}

/// Nothing comes from the server any more, and nobody says so.
fn server_away(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    direct(&web, &gopher);
    let mut there = Talk::begin(&web, &gopher, gopher.addresses[0]);
    let mut back = Talk::begin(&gopher, &web, web.addresses[0]);
    scene.underlay.silence_servers();
    let seconds = away().as_secs();
    for _ in 0..seconds {
        there.goes_on(50_000);
        back.goes_on(50_000);
        thread::sleep(Duration::from_secs(1));
    }
    same_bytes(&web, &gopher, 1_000_000);
    scene.underlay.hear_servers();
    scene.rename("gopher", "badger");
    let (resolver, name) = (MAGIC_DNS.parse().unwrap(), format!("badger.{DOMAIN}"));
    within(120, "changes arrive", || {
        there.goes_on(1000);
        web.resolve(resolver, &name).as_ref() == Ok(&gopher.addresses)
    });
    assert_eq!(web.state(), "running");
    back.goes_on(50_000);
}

fn start_offline(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    direct(&web, &gopher);
    // The map is written to disk a few seconds after it came.
    thread::sleep(Duration::from_secs(6));
    scene.underlay.silence_servers();
    let addresses = web.addresses.clone();
    let web = web.restarted().unwrap();
    assert_eq!(web.addresses, addresses);
    arrives(&web, &gopher, gopher.addresses[0], 15);
    arrives(&gopher, &web, web.addresses[0], 15);
    same_bytes(&web, &gopher, 100_000);
    scene.underlay.hear_servers();
    within(60, "the node is back", || web.state() == "running");
}
