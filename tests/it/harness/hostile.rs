//! A database with settings and objects that a stranger has chosen. With `RELAY_TEST_HOSTILE=1` every test database is one, so that
//! whole suites show that the product reads, writes and calls the same things in it.
//!
//! For each function that our SQL may name (whatever stands before a bracket in the sources and is a function of the server), and
//! for each operator, `public` has one of the same name and the same arguments, which raises an error; each type has a domain of
//! its name that takes no value. `public` comes first in the path. The settings change how texts are read and written, and make
//! `serializable` the isolation level.

use std::collections::BTreeSet;
use std::path::Path;

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, Executor};

/// Whether test databases are to be hostile.
pub fn wanted() -> bool {
    std::env::var("RELAY_TEST_HOSTILE").is_ok_and(|wanted| wanted == "1")
}

/// Where they are, the settings with which the statements of the tests themselves mean what they say.
pub fn of_tests(options: PgConnectOptions) -> PgConnectOptions {
    if !wanted() {
        return options;
    }
    options.options([
        ("search_path", "tests"),
        ("standard_conforming_strings", "on"),
        ("bytea_output", "hex"),
        ("default_transaction_isolation", "read committed"),
        ("datestyle", "ISO"),
        ("intervalstyle", "postgres"),
        ("timezone", "UTC"),
        ("extra_float_digits", "1"),
    ])
}

/// Makes a database hostile, where that is wanted. The connection is the tests' own.
pub async fn spoil(connection: &mut PgConnection) {
    if wanted() {
        execute(connection, "create schema tests".to_owned()).await;
        plant(connection).await;
        set(connection).await;
    }
}

/// Makes the objects.
pub async fn plant(connection: &mut PgConnection) {
    let names: Vec<String> = called().into_iter().collect();
    let statement = PLANT.replace("NAMES", &names.join(","));
    execute(connection, statement).await;
}

/// Changes the settings of the database, for connections that are opened later.
pub async fn set(connection: &mut PgConnection) {
    let settings = [
        ("search_path", "public, pg_catalog"),
        ("standard_conforming_strings", "off"),
        ("bytea_output", "escape"),
        ("default_transaction_isolation", "serializable"),
        ("datestyle", "German"),
        ("intervalstyle", "sql_standard"),
        ("timezone", "Asia/Kathmandu"),
        ("extra_float_digits", "-5"),
        ("escape_string_warning", "off"),
    ];
    let mut statement = "do $do$ begin ".to_owned();
    for (name, value) in settings {
        let value = match name {
            "search_path" => value.to_owned(),
            _ => format!("'{value}'"),
        };
        statement.push_str(&format!(
            "execute pg_catalog.format($$alter database %I set {name} = {value}$$, current_database()); "
        ));
    }
    statement.push_str("end $do$");
    execute(connection, statement).await;
}

async fn execute(connection: &mut PgConnection, statement: String) {
    let done = connection
        .execute(sqlx::raw_sql(AssertSqlSafe(statement)))
        .await;
    done.expect("plant hostile objects and settings");
}

/// The words before a bracket in the sources and the migrations.
fn called() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for folder in ["src", "migrations/postgres"] {
        collect(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join(folder),
            &mut names,
        );
    }
    assert!(names.contains("pg_visible_in_snapshot"), "{names:?}");
    names
}

fn collect(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, names);
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a text");
        for (at, _) in text.match_indices('(') {
            let before = text[..at].trim_end();
            let start = before
                .rfind(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'))
                .map_or(0, |at| at + 1);
            names.insert(before[start..].to_owned());
        }
    }
    names.remove("");
}

/// An object that can't be made (a pseudo-type as argument, a name that is taken) is left out.
const PLANT: &str = r"
do $do$
declare
    made integer := 0;
    signature record;
    word text;
    arguments text;
begin
    -- What is made here must not be called here.
    perform pg_catalog.set_config('search_path', 'pg_catalog', true);
    for signature in
        select p.proname::text as name, pg_get_function_identity_arguments(p.oid) as arguments,
               case when p.proretset then 'setof ' else '' end || format_type(p.prorettype, null) as returns
          from pg_proc p
         where p.pronamespace = 'pg_catalog'::regnamespace and p.proname = any (string_to_array('NAMES', ','))
    loop
        begin
            execute format(
                'create function public.%I(%s) returns %s language plpgsql as '
                '$$ begin raise exception ''a function of a stranger was called: %s''; end $$',
                signature.name, signature.arguments, signature.returns, signature.name);
            made := made + 1;
        exception when others then null;
        end;
    end loop;
    -- What fits a literal better than the function that is meant.
    for word in
        select distinct p.proname::text from pg_proc p
         where p.pronamespace = 'pg_catalog'::regnamespace and p.proname = any (string_to_array('NAMES', ','))
    loop
        foreach arguments in array array['text', 'text, text', 'text, text, text', 'bigint', 'bigint, text', 'xid8, text'] loop
            begin
                execute format(
                    'create function public.%I(%s) returns text language plpgsql as '
                    '$$ begin raise exception ''a function of a stranger was called: %s''; end $$',
                    word, arguments, word);
            exception when others then null;
            end;
        end loop;
    end loop;
    for signature in
        select o.oprname::text as name, format_type(o.oprleft, null) as lhs, format_type(o.oprright, null) as rhs,
               format_type(o.oprresult, null) as returns
          from pg_operator o
         where o.oprnamespace = 'pg_catalog'::regnamespace and o.oprkind = 'b'
           and o.oprname in ('=', '<>', '<', '>', '<=', '>=', '+', '-', '*', '/', '%', '||', '->', '->>', '?', '?|', '~', '!~', '&',
                             '~~', '@>')
           and o.oprleft::regtype::text in ('smallint', 'integer', 'bigint', 'text', 'name', 'xid8', 'xid', 'uuid', 'json',
               'jsonb', 'boolean', 'oid', 'pg_lsn', 'timestamp with time zone', 'interval', 'double precision', 'numeric', 'bytea',
               'bit', 'character')
    loop
        begin
            execute format(
                'create function public.trap_%s(%s, %s) returns %s language plpgsql as '
                '$$ begin raise exception ''an operator of a stranger was called: %s''; end $$',
                made, signature.lhs, signature.rhs, signature.returns, replace(signature.name, '%', '%%'));
            execute format('create operator public.%s (leftarg = %s, rightarg = %s, function = public.trap_%s)',
                           signature.name, signature.lhs, signature.rhs, made);
            made := made + 1;
        exception when others then null;
        end;
    end loop;
    foreach word in array array['text', 'int4', 'int8', 'integer', 'bigint', 'uuid', 'json', 'jsonb', 'bytea', 'xid8', 'timestamptz',
                                'interval', 'float8', 'regclass', 'pg_snapshot', 'name', 'bool'] loop
        execute format('create domain public.%I as pg_catalog.varchar check (value is null)', word);
    end loop;
    if made < 300 then
        raise exception 'only % objects were made', made;
    end if;
end
$do$";
