use std::{
    env, fs,
    net::IpAddr,
    thread,
    time::{Duration, Instant},
};

use chrono::{TimeDelta, Utc};
use serde_json::{Value, json};

use crate::scene::*;

pub const CASES: &[Case] = &[
    ("life.expired-rejoins", WITH_KEYS, expired_rejoins),
    ("life.expired-asks", WITH_KEYS, expired_asks),
    ("life.expired-killed", WITH_KEYS, expired_killed),
    ("life.expired-peer", ALL, expired_peer),
    ("life.deleted", WITH_KEYS, deleted),
    ("life.swept-out", WITH_KEYS, swept_out),
    ("life.renamed", ALL, renamed),
    ("life.logout", WITH_KEYS, logout),
    ("life.logout-peer", WITH_KEYS, logout_peer),
    ("life.server-restart", WITH_KEYS, server_restart),
    ("life.server-away", ALL, server_away),
    ("life.start-offline", ALL, start_offline),
    ("life.restarted", ALL, restarted),
    ("life.stream-cut", ALL, stream_cut),
    ("life.stream-garbled", ALL, stream_garbled),
    ("life.stream-stalled", &[C], stream_stalled),
    ("life.crowd", ALL, crowd),
    ("life.clock-jumps", ALL, clock_jumps),
    ("life.clock-back", ALL, clock_back),
    ("life.clock-wrong", &[H], clock_wrong),
    ("life.server-speaks", &[T], server_speaks),
    ("life.server-limits", &[T], server_limits),
];

/// A key that still opens the door does so when the node's own key expires.
fn expired_rejoins(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    same_bytes(&web, &gopher, 1000);
    let key_of = || gopher.peer("web").map(|peer| peer["PublicKey"].clone());
    let before = key_of();
    scene.expire("web");
    within(PATIENCE, "the peer hears of the new key", || {
        key_of().is_some_and(|now| Some(now) != before)
    });
    within(PATIENCE, "the node runs again", || web.state() == "running");
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
    within(PATIENCE, "the peer sends nothing more", || {
        !passes(&gopher, web.addresses[0])
    });
    assert!(!passes(&web, gopher.addresses[0]), "the peer takes packets");
    scene.approve(&page);
    within(PATIENCE, "the node runs again", || web.state() == "running");
    assert_eq!(web.addresses_now(), web.addresses);
    reach(&gopher, &web.addresses);
    same_bytes(&web, &gopher, 1_000_000);
}

/// The daemon is killed when the server has agreed to another key and the node has not heard of it.
fn expired_killed(server: Server) {
    let scene = Scene::new(server);
    for (name, flags) in [("web", &["--reusable"][..]), ("db", &[])] {
        let mut node = scene.ours(name, &scene.key(flags), scene.host());
        let file = node.host.state_of(name).join("keys.json");
        let keys = || -> Value { serde_json::from_slice(&fs::read(&file).unwrap()).unwrap() };
        let mut kept = keys();
        scene.expire(name);
        if flags.is_empty() {
            scene.approve(&node.page("its key has expired"));
        }
        within(PATIENCE, "the node has another key", || {
            keys()["node"] != kept["node"]
        });
        node.host.kill();
        kept["next"] = keys()["node"].clone();
        fs::write(&file, kept.to_string()).unwrap();
        node.host.restart();
        let addresses = node.addresses.clone();
        let node = Ours::attach(node.host, node.container.started_again()).unwrap();
        within(PATIENCE, "the node runs again", || {
            node.state() == "running"
        });
        assert_eq!(node.addresses_now(), addresses);
    }
}

fn expired_peer(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    reach(&web, &gopher.addresses);
    scene.expire("gopher");
    within(PATIENCE, "we send nothing more", || {
        !passes(&web, gopher.addresses[0])
    });
    assert!(!passes(&gopher, web.addresses[0]), "we take its packets");
    if !matches!(server, T) {
        // Theirs may ask twice, when an answer is slow.
        let key = scene.key(&["--reusable"]);
        gopher.join_again(&scene.url(), &key, "gopher");
        reach(&web, &gopher.addresses);
        same_bytes(&web, &gopher, 1_000_000);
    }
}

fn deleted(server: Server) {
    let scene = Scene::new(server);
    let (mut web, gopher) = scene.pair(scene.host(), scene.host());
    reach(&web, &gopher.addresses);
    let gone = |web: &Ours| {
        scene.delete("web");
        let page = web.page("deleted");
        within(PATIENCE, "the peer forgets it", || {
            gopher.peer("web").is_none()
        });
        assert!(!passes(&web.container, gopher.addresses[0]));
        page
    };
    // A person lets it in again, and it may have another address.
    let page = gone(&web);
    scene.approve(&page);
    web.settle(&gopher, "web");
    reach(&gopher, &web.addresses);
    reach(&web, &gopher.addresses);
    // Or the container starts again, and its key opens the door.
    gone(&web);
    let mut web = web.restarted().unwrap();
    web.settle(&gopher, "web");
    reach(&gopher, &web.addresses);
    same_bytes(&web, &gopher, 1_000_000);
}

/// An ephemeral node that its server forgot while it was away joins by itself, and its container has
/// the new address.
fn swept_out(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key(&["--reusable"]);
    let gopher = scene.gopher("gopher", &key, scene.host());
    let host = Host::start_in(scene.host(), &scene.url(), Some(&key));
    let container = Container::new("web");
    let ephemeral = json!({ "ephemeral": "true" });
    host.attach_to(&container, "tailnet", ephemeral).unwrap();
    let mut web = Ours {
        addresses: Vec::new(),
        container,
        host,
    };
    reach(&gopher, &web.addresses_now());
    let id_of = || gopher.peer("web").map(|peer| peer["ID"].clone());
    let before = id_of();
    scene.delete("web");
    // Traffic makes it look after its network more often, and so hear of it under Headscale.
    within(150, "it has joined anew", || {
        passes(&web, gopher.addresses[0]) && id_of().is_some_and(|now| Some(now) != before)
    });
    web.settle(&gopher, "web");
    reach(&gopher, &web.addresses);
    reach(&web, &gopher.addresses);
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
        within(PATIENCE, &format!("{name} is resolved"), || {
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
    within(PATIENCE, "the peer sends nothing more", || {
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
    within(PATIENCE, "we send nothing more", || {
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
    within(PATIENCE, "its endpoints are known", || {
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
    within(PATIENCE, "the status says so", || web.state() == "offline");
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

/// For how many seconds the server is away: in a run that may take its time, `AWAY=600`. Whose it
/// is makes little difference while it is away.
fn away(server: Server) -> u64 {
    let seconds = env::var("AWAY").ok().and_then(|text| text.parse().ok());
    seconds.unwrap_or(if matches!(server, C) { 60 } else { 15 })
}

/// Nothing comes from the server any more, and nobody says so.
fn server_away(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    direct(&web, &gopher);
    let mut there = Talk::begin(&web, &gopher, gopher.addresses[0]);
    let mut back = Talk::begin(&gopher, &web, web.addresses[0]);
    scene.underlay.silence_servers();
    for _ in 0..away(server) {
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

/// Peers have a session with the node as it was; WireGuard would notice after 15 s.
fn restarted(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    direct(&web, &gopher);
    same_bytes(&web, &gopher, 1000);
    let web = web.restarted().unwrap();
    within(8, "the peer reaches it again", || {
        passes(&gopher, web.addresses[0])
    });
    same_bytes(&web, &gopher, 1000);
}

fn stream_cut(server: Server) {
    mischief(server, Mischief::Cut, 20);
}

fn stream_garbled(server: Server) {
    mischief(server, Mischief::Garble, 20);
}

fn stream_stalled(server: Server) {
    // An HTTP/2 ping goes unanswered: after 45 s it is sent, and waited for 20 s.
    mischief(server, Mischief::Stall, 90);
}

/// The map stream suffers in the middle of a message, which is not lost.
fn mischief(server: Server, mischief: Mischief, seconds: u64) {
    let scene = Scene::new(server);
    let proxy = Proxy::start(&scene.underlay, PORT);
    let key = scene.key(&["--reusable"]);
    let web = Ours::join(scene.host(), &proxy.url(), &key, "web").unwrap();
    let gopher = scene.gopher("gopher", &key, scene.host());
    direct(&web, &gopher);
    let mut talk = Talk::begin(&web, &gopher, gopher.addresses[0]);
    let resolver = MAGIC_DNS.parse().unwrap();
    for (old, new) in [("gopher", "badger"), ("badger", "gopher")] {
        // In testcontrol, nodes keep their host's name.
        let old = if matches!(server, T) { "gopher" } else { old };
        proxy.does(mischief);
        scene.rename(old, new);
        let name = format!("{new}.{DOMAIN}");
        within(seconds, &format!("{name} is heard of"), || {
            talk.goes_on(1000);
            web.resolve(resolver, &name).as_ref() == Ok(&gopher.addresses)
        });
        assert!(proxy.is_done());
        let peers = web.node()["peers"].as_array().map(Vec::len);
        assert_eq!(peers, Some(1));
        if matches!(mischief, Mischief::Stall) {
            break;
        }
    }
    within(PATIENCE, "the node runs", || web.state() == "running");
    talk.goes_on(1_000_000);
}

/// A large tailnet whose members come, move and go.
fn crowd(server: Server) {
    // Headscale keeps keys by bcrypt, and so takes half a second for every node that joins.
    let count = if matches!(server, H) { 50 } else { 1000 };
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    direct(&web, &gopher);
    let mut talk = Talk::begin(&web, &gopher, gopher.addresses[0]);
    let outside = scene.host();
    let peers = |web: &Ours| web.node()["peers"].as_array().map_or(0, Vec::len);
    let mut crowd = Crowd::join(&outside, PORT, &scene.key(&["--reusable"]), count);
    within(60, "all have come", || peers(&web) == count + 1);
    talk.goes_on(100_000);
    crowd.move_house(&outside);
    talk.goes_on(100_000);
    let mut left = count;
    // There, nobody can leave.
    if !matches!(server, T) {
        left = count / 2;
        crowd.shrink_to(&outside, left);
        within(60, "half have gone", || peers(&web) == left + 1);
        talk.goes_on(100_000);
    }
    same_bytes(&web, &gopher, 1_000_000);
    let web = web.restarted().unwrap();
    within(PATIENCE, "all are known again", || peers(&web) == left + 1);
    reach(&web, &gopher.addresses);
    reach(&gopher, &web.addresses);
}

const DAY: i64 = 24 * 3600;

/// A scene's pair, of which our host has a clock that can be set.
fn clocked(scene: &Scene) -> (Ours, Gopher) {
    let key = scene.key(&["--reusable"]);
    let host = Host::start_by(WallClock::new(), scene.host(), &scene.url(), Some(&key));
    let web = Ours::attach(host, Container::new("web")).unwrap();
    let gopher = scene.gopher("gopher", &key, scene.host());
    direct(&web, &gopher);
    (web, gopher)
}

/// The time of day is set forth and back while the node runs.
fn clock_jumps(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = clocked(&scene);
    let mut talk = Talk::begin(&web, &gopher, gopher.addresses[0]);
    for seconds in [DAY, -DAY, 400 * DAY, 0] {
        web.host.set_clock(seconds);
        talk.goes_on(100_000);
        same_bytes(&web, &gopher, 100_000);
        assert_eq!(web.state(), "running");
    }
}

/// The time of day is set back while the node is down: WireGuard takes only handshakes that are
/// newer than those before.
fn clock_back(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = clocked(&scene);
    let mut web = web;
    for seconds in [-DAY, -2 * DAY] {
        web.host.set_clock(seconds);
        web = web.restarted().unwrap();
        arrives(&web, &gopher, gopher.addresses[0], 5);
        same_bytes(&web, &gopher, 100_000);
    }
}

/// Keys expire by the server's clock, however wrong ours is.
fn clock_wrong(server: Server) {
    let scene = Scene::new(server);
    let Control::Headscale(headscale) = &scene.control else {
        panic!("only Headscale says when a key will expire");
    };
    let (web, gopher) = clocked(&scene);
    let expire_in =
        |seconds| headscale.expire("gopher", Some(Utc::now() + TimeDelta::seconds(seconds)));
    web.host.set_clock(DAY);
    expire_in(3600);
    thread::sleep(Duration::from_secs(3));
    reach(&web, &gopher.addresses);
    web.host.set_clock(-DAY);
    expire_in(5);
    within(60, "we send nothing more", || {
        !passes(&web, gopher.addresses[0])
    });
}

/// What the server has to say is shown, and what it asks is answered.
fn server_speaks(server: Server) {
    let scene = Scene::new(server);
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    direct(&web, &gopher);
    let answer = scene.administer("ping?node=web", "");
    assert_eq!(answer.trim(), "501", "the node has services for servers?");

    let message = json!({
        "Health": ["the moon is full"],
        "DisplayMessages": { "terms": { "Title": "New terms", "Text": "they are long" } },
        "Debug": { "Exit": 7, "DisableLogTail": true },
    });
    scene.administer("tell?node=web", &message.to_string());
    within(PATIENCE, "the status shows it", || {
        let status = web.host.tailnode(&["status"]).unwrap();
        status.contains("the moon is full") && status.contains("New terms: they are long")
    });
    within(PATIENCE, "the log shows it", || {
        web.host.log().contains("exit is ignored")
    });
    same_bytes(&web, &gopher, 1000);
}

/// A server that has too much to do is not pressed.
fn server_limits(server: Server) {
    let scene = Scene::new(server);
    scene.administer("limit?count=2&seconds=2", "");
    let began = Instant::now();
    let web = scene.ours("web", &scene.key(&[]), scene.host());
    let took = began.elapsed();
    assert!(
        took >= Duration::from_secs(4),
        "it came back after {took:?}"
    );
    assert_eq!(web.state(), "running");
}
