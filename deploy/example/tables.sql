-- The example's tables, the same in both databases.
create table accounts (
    id bigint primary key,
    name text not null
);
create table users (
    id bigint primary key,
    account_id bigint not null references accounts,
    email text not null unique
);
create table orders (
    id bigint primary key,
    user_id bigint not null references users,
    amount numeric(12, 2) not null
);
