use std::{
    thread,
    time::{Duration, Instant},
};

use serde_json::json;
use tailnode_tests::Host;

use crate::scene::*;

pub const CASES: &[Case] = &[
    ("join.reusable", ALL, reusable),
    ("join.once", WITH_KEYS, once),
    ("join.expired", WITH_KEYS, expired),
    ("join.ephemeral", WITH_KEYS, ephemeral),
    ("join.tagged", WITH_KEYS, tagged),
    ("join.revoked", WITH_KEYS, revoked),
    ("join.login", ALL, login),
    ("join.private-ca", ALL, private_ca),
    ("join.plain-http", ALL, plain_http),
    ("join.server-away", ALL, server_away),
];

fn reusable(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key(&["--reusable"]);
    let web = scene.ours("web", &key, scene.host());
    let db = scene.ours("db", &key, scene.host());
    let gopher = scene.gopher("gopher", &key, scene.host());
    for container in [&web, &db] {
        reach(container, &gopher.addresses);
        reach(&gopher, &container.addresses);
    }
    reach(&web, &db.addresses);
}

fn once(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key(&[]);
    let _gopher = scene.gopher("gopher", &key, scene.host());
    let error = Ours::join(scene.host(), &scene.url(), &key, "web").err();
    assert!(
        error.is_some_and(|error| error.contains("key")),
        "we joined by a key that was used"
    );
    let key = scene.key(&[]);
    let _web = scene.ours("web", &key, scene.host());
    let error = Gopher::join(scene.host(), &scene.url(), &key, "second").err();
    assert!(error.is_some(), "Go's client joined by a key that was used");
}

fn ephemeral(server: Server) {
    let scene = Scene::new(server);
    let gopher = scene.gopher("gopher", &scene.key(&[]), scene.host());
    let web = scene.ours("web", &scene.key(&["--ephemeral"]), scene.host());
    let container = Container::new("brief");
    let key = web.host.auth_key("brief.key", &scene.key(&["--ephemeral"]));
    let options = json!({ "auth-key": key, "ephemeral": "true" });
    web.host.attach_to(&container, "fleeting", options).unwrap();
    within(PATIENCE, "the node is there", || {
        gopher.peer("brief").is_some()
    });
    drop(container);
    within(PATIENCE, "the node is gone", || {
        gopher.peer("brief").is_none()
    });
}

fn expired(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key_for_a_second();
    thread::sleep(Duration::from_millis(1500));
    let ours = Ours::join(scene.host(), &scene.url(), &key, "web").err();
    assert!(ours.is_some_and(|error| error.contains("key")));
    let theirs = Gopher::join(scene.host(), &scene.url(), &key, "gopher").err();
    assert!(theirs.is_some());
}

fn tagged(server: Server) {
    let scene = Scene::new(server);
    let tag = scene.tag_flags("tag:web");
    let gopher = scene.gopher("gopher", &scene.key(&[]), scene.host());
    let web = scene.ours("web", &scene.key(&tag), scene.host());
    within(PATIENCE, "the tag is seen", || {
        gopher
            .peer("web")
            .is_some_and(|peer| peer["Tags"] == json!(["tag:web"]))
    });
    reach(&gopher, &web.addresses);
}

fn revoked(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key(&["--reusable"]);
    let _before = scene.ours("before", &key, scene.host());
    scene.revoke_keys();
    let ours = Ours::join(scene.host(), &scene.url(), &key, "web").err();
    assert!(ours.is_some_and(|error| error.contains("key")));
    let theirs = Gopher::join(scene.host(), &scene.url(), &key, "gopher").err();
    assert!(theirs.is_some());
}

fn login(server: Server) {
    let scene = Scene::by_login(server);
    let open = |page: &str| scene.approve(page);
    let gopher = Gopher::log_in(scene.host(), &scene.url(), "gopher", open).unwrap();
    // Our container starts, tells the page, and is on the tailnet once that was opened.
    let host = Host::start_in(scene.host(), &scene.url(), None);
    let mut web = Ours::attach(host, Container::new("web")).unwrap();
    assert!(web.addresses.is_empty());
    let page = web.page("");
    let told = format!("log in: open {page}");
    assert!(web.host.status_text().contains(&told));
    assert!(
        web.host.log().contains(&page),
        "the log does not tell {page}"
    );
    scene.approve(&page);
    web.settle(&gopher, "web");
    reach(&web, &gopher.addresses);
    reach(&gopher, &web.addresses);

    // Where it is not to start before, its start fails and tells the page; the next one succeeds.
    let strict = Container::new("strict");
    let options = json!({ "require-login": "true" });
    let attach = || web.host.attach_to(&strict, "tailnet", options.clone());
    let error = attach().unwrap_err();
    let login = &web.host.status_of(&strict).unwrap()["node"]["login"];
    assert_eq!(login["state"], "needs-login");
    let page = login["url"].as_str().unwrap();
    assert!(error.contains(page), "{error} does not tell {page}");
    scene.approve(page);
    attach().unwrap();
    let status = web.host.status();
    assert!(
        status.len() == 2
            && status
                .iter()
                .all(|it| it["node"]["login"]["state"] == "running")
    );
}

fn private_ca(server: Server) {
    let scene = Scene::secure(server);
    assert!(scene.url().starts_with("https:"));
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    reach(&web, &gopher.addresses);
    reach(&gopher, &web.addresses);
    // A machine that was not told of the CA, which learns what to do.
    let key = scene.key(&["--reusable"]);
    let error = Ours::join(scene.underlay.host(), &scene.url(), &key, "stranger").err();
    let error = error.expect("we joined by a server that proved nothing");
    assert!(error.contains("SSL_CERT_FILE"), "{error}");
}

fn plain_http(server: Server) {
    let scene = Scene::new(server);
    assert!(scene.url().starts_with("http:"));
    let (web, gopher) = scene.pair(scene.host(), scene.host());
    reach(&web, &gopher.addresses);
    reach(&gopher, &web.addresses);
}

fn server_away(server: Server) {
    let scene = Scene::new(server);
    let key = scene.key(&["--reusable"]);
    scene.underlay.cut_off(&scene.url());
    let host = Host::start_in(scene.host(), &scene.url(), Some(&key));
    let container = Container::new("web");
    let began = Instant::now();
    let error = host.attach(&container).unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(10));
    assert!(
        error.contains("control server") && error.contains(&scene.url()),
        "{error}"
    );

    scene.underlay.connect_again();
    let web = Ours::attach(host, container).unwrap();
    let gopher = scene.gopher("gopher", &key, scene.host());
    direct(&web, &gopher);

    // A known container starts from its last map.
    scene.underlay.cut_off(&scene.url());
    let Ours {
        host, container, ..
    } = web;
    host.detach(&container).unwrap();
    let began = Instant::now();
    let web = Ours::attach(host, container.started_again()).unwrap();
    assert!(began.elapsed() < Duration::from_secs(10));
    reach(&web, &gopher.addresses[..1]);
    within(PATIENCE, "our status tells it", || {
        web.node()["login"]["state"] == "offline"
    });

    scene.underlay.connect_again();
    within(60, "our node is back", || {
        web.node()["login"]["state"] == "running"
    });
    let late = scene.gopher("late", &key, scene.host());
    reach(&web, &late.addresses);
    reach(&late, &web.addresses);
}
